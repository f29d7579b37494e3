"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = selector => document.querySelector(selector);

// --- Small tools. Strings are only ever appended as text, never parsed as HTML. ---

const DRAWN = new Set(["svg", "circle", "line", "path", "text", "rect", "g"]);
const make = (name, attributes = {}, ...children) => {
  const node = DRAWN.has(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.map(child => child instanceof Node ? child : String(child)));
  return node;
};
const known = value => value !== null && value !== undefined;
const show = (value, digits = 3) => !known(value) ? "–" : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(digits > 2 ? 2 : 1) : value.toPrecision(digits);
const short = value => value && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
const percent = (value, digits = 1) => known(value) ? `${(100 * value).toFixed(digits)} %` : "–";
const count = value => value.toLocaleString("en");
const when = at => at === "end" ? "" : at.startsWith("along") ? ` ${at}` : ` at ${at}`;
const labelOf = method => {
  const c = method.conditions, variant = method.name.includes(".") || c.readout === "linear";
  return c.method + when(c.at) + (variant ? ` (${c.readout} readout)` : "")
    + (c.query === "val" ? "" : ` on ${c.query}`) + (c.runs > 1 ? `, mean of ${c.runs} runs` : "");
};
// A ranking of cleaning may be called by its method and more: "sgd-ie along, 4 runs" has the colour of sgd-ie.
const colour = name => `var(--${name.replaceAll(" ", "-").replaceAll(/[^\w-]/g, "")}, var(--${name.split(/[ ,]/)[0]}, var(--other)))`;
const ticks = (low, high, wanted) => {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted, magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * magnitude).find(s => s >= raw * .999), first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
};
// Draws at the width there is, and again when that changes, so that the letters of a chart never shrink.
const plot = (svg, height, paint) => {
  let width = 0;
  const draw = () => {
    const now = Math.round(svg.getBoundingClientRect().width) || 600;
    if (now === width) return;
    width = now;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    svg.replaceChildren();
    paint(width);
  };
  draw();
  new ResizeObserver(draw).observe(svg);
  return () => { width = 0; draw(); };
};
