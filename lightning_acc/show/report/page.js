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

// --- One sample: its card, and the tip beside the pointer. ---

const picture = (id, source) => {
  const image = make("img", {src: source, alt: `sample ${id}`});
  image.addEventListener("load", () => image.classList.toggle("fine", image.naturalWidth > 48));
  return image;
};
const words = (text, shown) => {
  if (text.length <= shown) return make("div", {class: "text"}, text);
  const button = make("button", {class: "text", type: "button", "aria-expanded": "false"}, text);
  button.addEventListener("click", () => button.setAttribute("aria-expanded", button.getAttribute("aria-expanded") === "false"));
  return button;
};
const called = id => `#${id}` + (data.samples[id].name === undefined ? "" : ` ${data.samples[id].name}`);
const was = sample => sample.true_label === undefined || sample.true_label === sample.label ? "corrupted" : `was ${sample.true_label}`;
const card = (id, lines) => {
  const sample = data.samples[id], box = make("div", {class: "sample" + (sample.corrupted ? " corrupted" : "")});
  if (sample.image) box.append(picture(id, sample.image));
  if (sample.text) box.append(words(sample.text, 200));
  box.append(make("div", {}, (sample.label === undefined ? "" : `${sample.label} · `) + called(id)));
  if (sample.corrupted) box.append(make("div", {class: "flip"}, was(sample)));
  box.append(...lines.map(line => make("div", {class: "number"}, line)));
  return box;
};
const tip = $("#tip"), said = $("#said");
const hide = () => { tip.hidden = true; };
const tell = (x, y, content, aloud) => {
  tip.replaceChildren(content);
  tip.hidden = false;
  const left = x + 16 + tip.offsetWidth > document.documentElement.clientWidth - 8 ? x - 16 - tip.offsetWidth : x + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
  if (aloud) said.textContent = [...content.querySelectorAll("div, tr")].map(part => part.textContent).join(", ") || content.textContent;
};
// What pointing at, touching, focusing and stepping through a chart have in common. `nearest` maps a place in the chart to
// an index or -1; `at` shows an index, or nothing for -1; `size` counts the indices.
const explore = (svg, size, nearest, at) => {
  let index = -1;
  const go = (next, aloud) => { index = next; at(index, aloud); if (index < 0) hide(); };
  const point = event => {
    const box = svg.getBoundingClientRect();
    go(nearest(event.clientX - box.left, event.clientY - box.top), false);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => go(-1));
  svg.addEventListener("blur", () => go(-1));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible") && size()) go(Math.max(0, index), true); });
  svg.addEventListener("keydown", event => {
    const moves = {ArrowRight: index + 1, ArrowUp: index + 1, ArrowLeft: index - 1, ArrowDown: index - 1, Home: 0, End: size() - 1};
    if (event.key === "Escape") go(-1);
    else if (event.key in moves && size()) {
      go(Math.max(0, Math.min(size() - 1, moves[event.key])), true);
      event.preventDefault();
    }
  });
};
addEventListener("scroll", hide, {passive: true});

// --- Agreement: a scatter plot for each estimate, and the figures. ---

const compared = data.methods.filter(method => method.points);
const dots = new Map(); // sample id -> its dots in all plots, so that pointing at one marks it everywhere
const mark = (id, on) => { for (const dot of dots.get(id) || []) dot.classList.toggle("at", on); };
const scatter = method => {
  const a = method.agreement, caption = make("figcaption", {}, labelOf(method));
  caption.append(make("small", {}, `Kendall ${show(a.kendall)} · RMSE ${show(a.rmse)} (${show(a.rmse_sd, 2)} sd)`));
  const svg = make("svg", {role: "img", tabindex: 0, "aria-label":
    `${labelOf(method)} against leave-one-out, ${method.n_compared} samples, Kendall ${show(a.kendall)}; arrow keys step through them`});
  const usable = method.points.filter(p => known(p[1]) && known(p[2])), truths = usable.map(p => p[1]), estimates = usable.map(p => p[2]);
  const low = Math.min(...truths), high = Math.max(...truths), pad = (high - low) * .06 || 1e-9;
  // Estimates far off in scale get an axis of their own; a few outliers are drawn at the edge instead.
  const far = estimates.filter(v => v < low - pad || v > high + pad).length > .05 * usable.length;
  const bottom = far ? Math.min(...estimates) : low, top = far ? Math.max(...estimates) : high, gap = (top - bottom) * .06 || 1e-9;
  const clamp = v => Math.max(bottom - gap, Math.min(top + gap, v));
  const cut = usable.filter(p => p[2] !== clamp(p[2])).length;
  if (cut) caption.append(make("small", {}, `${cut} estimate${cut > 1 ? "s lie" : " lies"} outside the picture, drawn at its edge`));
  if (far) caption.append(make("small", {}, "the estimate has a scale of its own"));
  if (method.points.length < method.n_compared)
    caption.append(make("small", {}, `${count(method.points.length)} of ${count(method.n_compared)} samples are drawn: the extremes and some between`));
  usable.sort((p, q) => p[1] - q[1]);
  const height = 288, left = 58, edge = height - 44;
  let places = [];
  const paint = width => {
    const right = width - 10;
    const x = v => left + (v - low + pad) / (high - low + 2 * pad) * (right - left);
    const y = v => edge - (clamp(v) - bottom + gap) / (top - bottom + 2 * gap) * (edge - 8);
    svg.append(make("line", {class: "axis", x1: left, y1: edge, x2: right, y2: edge}), make("line", {class: "axis", x1: left, y1: 8, x2: left, y2: edge}));
    if (low < 0 && high > 0) svg.append(make("line", {class: "zero", x1: x(0), y1: 8, x2: x(0), y2: edge}));
    if (bottom < 0 && top > 0) svg.append(make("line", {class: "zero", x1: left, y1: y(0), x2: right, y2: y(0)}));
    const from = Math.max(low - pad, bottom - gap), to = Math.min(high + pad, top + gap);
    if (to > from) svg.append(make("line", {class: "ideal", x1: x(from), y1: y(from), x2: x(to), y2: y(to)}));
    for (const v of ticks(low, high, 4)) svg.append(make("text", {x: x(v), y: edge + 16, "text-anchor": "middle"}, short(v)));
    for (const v of ticks(bottom, top, 4)) svg.append(make("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, short(v)));
    svg.append(make("text", {x: (left + right) / 2, y: height - 8, "text-anchor": "middle", class: "name"}, "leave-one-out"),
      make("text", {x: 11, y: edge / 2, transform: `rotate(-90 11 ${edge / 2})`, "text-anchor": "middle", class: "name"}, "estimate"));
    for (const place of places) dots.get(place.id).delete(place.dot);
    places = usable.map(([id, truth, estimate]) => {
      const dot = make("circle", {class: "dot" + (data.samples[id].corrupted ? " corrupted" : ""), "data-sample": id, cx: x(truth).toFixed(1), cy: y(estimate).toFixed(1), r: 3.2});
      if (!dots.has(id)) dots.set(id, new Set());
      dots.get(id).add(dot);
      return {id, truth, estimate, dot, x: x(truth), y: y(estimate)};
    });
    // The corrupted are few: they lie on top.
    svg.append(...places.filter(p => !data.samples[p.id].corrupted).map(p => p.dot), ...places.filter(p => data.samples[p.id].corrupted).map(p => p.dot));
  };
  let marked = null;
  explore(svg, () => places.length, (x, y) => {
    let best = -1, least = 14 ** 2;
    places.forEach((p, i) => { const d = (p.x - x) ** 2 + (p.y - y) ** 2; if (d < least) { least = d; best = i; } });
    return best;
  }, (index, aloud) => {
    if (marked !== null) mark(marked, false);
    marked = index < 0 ? null : places[index].id;
    if (marked === null) return;
    mark(marked, true);
    const p = places[index], box = svg.getBoundingClientRect();
    tell(box.left + p.x, box.top + p.y, card(p.id, [`leave-one-out ${show(p.truth)}`, `${method.conditions.method} ${show(p.estimate)}`]), aloud);
  });
  return {figure: make("figure", {}, caption, svg), draw: () => plot(svg, height, paint)};
};
if (compared.length) {
  const section = $("#agreement"), figures = compared.map(scatter);
  section.hidden = false;
  if (data.n_corrupted) $("#marked").textContent = "The samples known to be corrupted are orange.";
  section.querySelector(".plots").append(...figures.map(f => f.figure));
  figures.forEach(f => f.draw());
  const columns = {rmse: "RMSE", rmse_sd: "RMSE / sd", kendall: "Kendall", spearman: "Spearman",
    jaccard_10: "Jaccard 10 %", jaccard_30: "30 %", jaccard_50: "50 %", jaccard_70: "70 %"};
  const head = (...names) => make("tr", {}, ...names.map(name => make("th", {scope: "col"}, name)));
  section.querySelector("thead").append(head("method", ...Object.values(columns), "samples", "seconds"));
  section.querySelector("tbody").append(...compared.map(method => make("tr", {}, make("td", {}, labelOf(method)),
    ...Object.keys(columns).map(c => make("td", {}, show(method.agreement[c]))), make("td", {}, count(method.n_compared)), make("td", {}, show(method.seconds)))));
}

// --- The samples: both ends as cards, and the ranking as a table that is sorted, filtered and turned over page by page. ---

const PAGE = 25;
const state = {sort: "rank", down: false, page: 0};
let rows = [];
const chosen = () => data.methods[$("#method").value];
const columns = [
  {key: "rank", name: "rank"},
  {key: "id", name: "sample", class: "left what"},
  {key: "label", name: "label", class: "left label", when: () => rows.some(row => row.label !== undefined)},
  {key: "score", name: "score"},
  {key: "truth", name: "leave-one-out", when: () => rows.some(row => known(row.truth))},
];
const collator = new Intl.Collator("en", {numeric: true});
const compare = (a, b) => {
  const [p, q] = [a[state.sort], b[state.sort]];
  if (!known(p) || !known(q)) return known(q) - known(p) || a.rank - b.rank; // what is not known comes last either way
  return (typeof p === "string" ? collator.compare(p, q) : p - q) * (state.down ? -1 : 1) || a.rank - b.rank;
};
const gallery = () => {
  for (const box of document.querySelectorAll(".gallery")) {
    const order = box.dataset.end === "harmful" ? rows : [...rows].reverse();
    const texts = order.slice(0, data.shown).some(row => data.samples[row.id].text);
    box.classList.toggle("texts", texts);
    box.replaceChildren(...order.slice(0, texts ? data.shown / 3 : data.shown).map(row => card(row.id, [show(row.score)])));
  }
};
const cells = {
  rank: row => [count(row.rank)],
  id: row => {
    const sample = data.samples[row.id], about = make("div", {}), entry = make("div", {class: "entry"});
    if (sample.image) entry.append(picture(row.id, sample.image));
    if (sample.text) about.append(words(sample.text, 130));
    about.append(make("span", {class: "number"}, called(row.id)));
    // On a narrow screen text needs the room, and the label stands here instead of in its column.
    if (sample.text && row.label !== undefined) about.append(make("span", {class: "narrow"}, " · ", ...cells.label(row)));
    entry.append(about);
    return [entry];
  },
  label: row => [row.label === undefined ? "" : `${row.label} `, ...row.corrupted ? [make("div", {class: "flip"}, was(data.samples[row.id]))] : []],
  score: row => {
    const bar = make("i"), meter = make("span", {class: "meter", "aria-hidden": "true"}, bar);
    const most = Math.max(...rows.map(r => Math.abs(r.score || 0))) || 1, share = Math.abs(row.score || 0) / most * 50;
    bar.style.width = `${share}%`;
    bar.style.left = `${row.score < 0 ? 50 - share : 50}%`;
    return [meter, make("span", {class: "value"}, show(row.score)),
      ...row.retrained ? [make("span", {class: "retrained", title: "retrained without: the true score"}, "✓")] : []];
  },
  truth: row => [show(row.truth)],
};
const table = () => {
  const shownColumns = columns.filter(column => !column.when || column.when());
  const label = $("#label").value, kept = rows.filter(row => (label === "" || row.label === label.slice(1))
    && (!$("#corrupted").checked || row.corrupted) && (!$("#harmful").checked || row.score < 0)).sort(compare);
  const pages = Math.max(1, Math.ceil(kept.length / PAGE));
  state.page = Math.max(0, Math.min(pages - 1, state.page));
  const from = state.page * PAGE, part = kept.slice(from, from + PAGE);
  shownColumns.forEach(column => {
    const heading = $(`#rows th[data-key=${column.key}]`), sorted = state.sort === column.key;
    if (sorted) heading.setAttribute("aria-sort", state.down ? "descending" : "ascending"); else heading.removeAttribute("aria-sort");
    heading.querySelector("span").textContent = !sorted ? "" : state.down ? " ↓" : " ↑";
  });
  $("#rows").classList.toggle("texts", part.some(row => data.samples[row.id].text));
  for (const column of columns) $(`#rows th[data-key=${column.key}]`).hidden = !shownColumns.includes(column);
  const nothing = make("tr", {}, make("td", {colspan: shownColumns.length}, "No sample passes these filters."));
  $("#rows tbody").replaceChildren(...part.length ? part.map(row => make("tr", {"data-sample": row.id},
    ...shownColumns.map(column => make("td", {class: column.class || ""}, ...cells[column.key](row))))) : [nothing]);
  $("#range").textContent = part.length ? `${count(from + 1)}–${count(from + part.length)} of ${count(kept.length)}` : "none";
  $("#previous").disabled = !state.page;
  $("#next").disabled = state.page >= pages - 1;
};
for (const column of columns) {
  const button = make("button", {type: "button"}, column.name, make("span", {"aria-hidden": "true"}));
  button.addEventListener("click", () => {
    state.down = state.sort === column.key && !state.down;
    state.sort = column.key;
    state.page = 0;
    table();
  });
  $("#rows thead tr").append(make("th", {scope: "col", "data-key": column.key, class: column.class || ""}, button));
}
const rank = () => {
  const method = chosen(), r = method.ranking;
  const retrained = new Set(r.retrained);
  rows = r.samples.map((id, i) => ({id, retrained: retrained.has(id), rank: r.ranks[i], score: r.scores[i], truth: r.truth && r.truth[i],
    label: data.samples[id].label, corrupted: data.samples[id].corrupted}));
  const part = r.samples.length < r.total;
  $("#extent").textContent = `${count(r.total)} removals of a single sample, ranked by ${labelOf(method)}; rank 1 is the most harmful. `
    + (part ? `This page holds the ${count(r.samples.length / 2)} most harmful and the ${count(r.samples.length / 2)} most helpful of them; `
      + `all are in scores/${method.name}.parquet.` : "Click a heading to sort.");
  $("#ranking h2").textContent = part ? "Both ends of the ranking" : "The whole ranking";
  const labels = [...new Set(rows.map(row => row.label).filter(label => label !== undefined))].sort(collator.compare), before = $("#label").value;
  $("#by-label").hidden = labels.length < 2 || labels.length > 1000;
  // The values have a letter before them, so that an empty label differs from all labels.
  $("#label").replaceChildren(make("option", {value: ""}, "all"), ...labels.map(label => make("option", {value: `=${label}`}, label)));
  $("#label").value = labels.includes(before.slice(1)) ? before : "";
  if (state.sort === "truth" && !r.truth) Object.assign(state, {sort: "rank", down: false});
  state.page = 0;
  $("#verdict").dataset.word = method.verdict.word;
  $("#verdict b").textContent = method.verdict.word;
  $("#verdict span").textContent = method.verdict.text;
  gallery();
  table();
};
$("#by-corruption").hidden = !data.n_corrupted;
data.methods.forEach((method, i) => $("#method").append(make("option", {value: i}, labelOf(method))));
$("#method").addEventListener("change", rank);
for (const filter of ["#label", "#corrupted", "#harmful"]) $(filter).addEventListener("change", () => { state.page = 0; table(); });
$("#previous").addEventListener("click", () => { state.page -= 1; table(); });
$("#next").addEventListener("click", () => { state.page += 1; table(); });
rank();

// --- Groups. ---

if (data.groups.length) {
  const section = $("#groups");
  section.hidden = false;
  section.querySelector("thead").append(make("tr", {}, ...["method", "group", "samples", "score", "source", "estimate"].map(name => make("th", {scope: "col"}, name))));
  section.querySelector("tbody").append(...data.groups.flatMap(table => table.rows.map(row => make("tr", {}, make("td", {}, labelOf(table)),
    make("td", {class: "left"}, row.name), make("td", {}, count(row.samples)), make("td", {}, show(row.score)),
    make("td", {}, row.source === "estimate" ? "estimate" : "retrained"), make("td", {}, show(row.estimate))))));
}

// --- Line charts: finding the corrupted, and cleaning. ---

// `describe()` gives {x: [low, high], y: [low, high], xTicks, yTicks, under(svg, x, y), series, at(value), show(value)};
// a series is {name, colour, dash, off, points: [[x, y, low, high]]}. Returns a function that draws it again.
const lines = (svg, height, describe) => {
  let chart, x, y, stops = [], cursor;
  const draw = plot(svg, height, width => {
    chart = describe();
    const left = 58, right = width - 16, edge = height - 42;
    x = v => left + (v - chart.x[0]) / (chart.x[1] - chart.x[0] || 1) * (right - left);
    y = v => edge - (v - chart.y[0]) / (chart.y[1] - chart.y[0] || 1) * (edge - 12);
    for (const [v, name] of chart.yTicks) svg.append(make("line", {class: "axis", x1: left, x2: right, y1: y(v), y2: y(v)}),
      make("text", {x: left - 7, y: y(v) + 4, "text-anchor": "end"}, name));
    let last = -Infinity;
    const apart = chart.xTicks.filter(([v]) => { const fits = x(v) - last > 40; if (fits) last = x(v); return fits; });
    for (const [v, name] of apart) svg.append(make("text", {x: x(v), y: edge + 17, "text-anchor": v === chart.x[1] ? "end" : "middle"}, name));
    svg.append(make("text", {x: (left + right) / 2, y: height - 6, "text-anchor": "middle", class: "name"}, chart.name));
    chart.under(svg, x, y);
    const visible = chart.series.filter(s => !s.off);
    visible.forEach((s, i) => {
      // Intervals at the same fraction stand side by side.
      const aside = (i - (visible.length - 1) / 2) * Math.min(5, 40 / visible.length), place = p => x(p[0]) + (known(p[2]) ? aside : 0);
      svg.append(make("path", {d: "M" + s.points.map(p => `${place(p).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L"), fill: "none", stroke: s.colour,
        "stroke-width": 2, "stroke-dasharray": s.dash, "stroke-linejoin": "round", class: "curve"}));
      for (const p of s.points) if (known(p[2]) && known(p[3])) svg.append(
        make("line", {class: "interval", x1: place(p), x2: place(p), y1: y(p[2]), y2: y(p[3]), stroke: s.colour, "stroke-width": 1.5, opacity: .7}),
        make("rect", {x: place(p) - 3, y: y(p[1]) - 3, width: 6, height: 6, rx: 1.5, fill: s.colour}));
    });
    stops = [...new Set(visible.flatMap(s => s.points.map(p => p[0])))].sort((a, b) => a - b);
    cursor = make("line", {class: "cursor", y1: 12, y2: edge, visibility: "hidden"});
    svg.append(cursor);
  });
  explore(svg, () => stops.length, px => {
    let best = -1;
    stops.forEach((v, i) => { if (best < 0 || Math.abs(x(v) - px) < Math.abs(x(stops[best]) - px)) best = i; });
    return best;
  }, (index, aloud) => {
    cursor.setAttribute("visibility", index < 0 ? "hidden" : "visible");
    if (index < 0) return;
    const stop = stops[index], box = svg.getBoundingClientRect(), body = make("tbody");
    cursor.setAttribute("x1", x(stop));
    cursor.setAttribute("x2", x(stop));
    const near = chart.series.filter(s => !s.off).map(s => [s, s.points.reduce((a, b) => Math.abs(b[0] - stop) < Math.abs(a[0] - stop) ? b : a)])
      .filter(([, p]) => Math.abs(x(p[0]) - x(stop)) < 8).sort(([, p], [, q]) => q[1] - p[1]);
    for (const [s, p] of near) body.append(make("tr", {}, make("td", {}, `${s.name} `), make("td", {}, chart.show(p))));
    tell(box.left + x(stop), box.top + 30, make("div", {}, make("b", {}, chart.at(stop)), make("table", {}, body)), aloud);
  });
  return draw;
};
// Keys that switch their curve off and on.
const legend = (box, series, redraw) => box.append(...series.map(s => {
  const swatch = make("svg", {viewBox: "0 0 22 8", "aria-hidden": "true"},
    make("line", {x1: 0, x2: 22, y1: 4, y2: 4, stroke: s.colour, "stroke-width": 3, "stroke-dasharray": s.dash}));
  const key = make("button", {type: "button", "aria-pressed": "true"}, swatch, s.name);
  key.addEventListener("click", () => { s.off = !s.off; key.setAttribute("aria-pressed", !s.off); redraw(); });
  return key;
}));

const curves = data.methods.filter(method => method.precision);
if (curves.length && data.n_corrupted) {
  const section = $("#detection"), n = Math.max(...curves.map(method => method.precision.at(-1)[0]));
  section.hidden = false;
  section.querySelector("p").textContent = `${count(data.n_corrupted)} of the training samples are known to be corrupted. Looking through the k most harmful`
    + ` first, this share of them is. Dotted: by chance. The thin vertical line is at k = ${count(data.n_corrupted)}.`;
  const series = curves.map(method => ({name: labelOf(method), colour: colour(method.conditions.method), dash: method.name.includes(".") ? "7 3" : "", points: method.precision}));
  const redraw = lines(section.querySelector("figure > svg"), 320, () => ({
    x: [1, n], y: [0, 1], name: "k, samples looked at", series,
    xTicks: [1, ...ticks(1, n, 4).filter(k => k > .1 * n && k < .92 * n && Number.isInteger(k)), n].map(k => [k, count(k)]),
    yTicks: [0, .25, .5, .75, 1].map(v => [v, percent(v, 0)]),
    under: (svg, x, y) => svg.append(
      ...data.n_corrupted <= n ? [make("line", {class: "axis", x1: x(data.n_corrupted), x2: x(data.n_corrupted), y1: y(0), y2: y(1)})] : [],
      make("line", {x1: x(1), x2: x(n), y1: y(data.corrupted_share), y2: y(data.corrupted_share), stroke: "var(--dim)", "stroke-dasharray": "2 4"})),
    at: k => `among the ${count(k)} most harmful`, show: p => percent(p[1], 0),
  }));
  legend(section.querySelector(".legend"), series, redraw);
}

if (data.cleaning) {
  const section = $("#cleaning"), choice = $("#measure"), all = data.cleaning.methods, none = all.find(curve => curve.name === "none");
  const points = all.flatMap(curve => curve.points), removed = all.filter(curve => curve.name !== "none");
  const classifier = points.some(p => known(p.accuracy[0])), on = data.cleaning.tested;
  const sign = v => v > 0 ? "+" : "", signed = v => classifier ? sign(v) + (100 * v).toFixed(1) : sign(v) + show(v, 3);
  const measures = {
    accuracy: {name: `accuracy on ${on}`, tick: v => `${Number((100 * v).toFixed(2))} %`, show: v => percent(v)},
    gain: {name: classifier ? "gain in accuracy over removing nothing, in points" : "gain in loss over removing nothing", tick: signed, show: signed},
    loss: {name: `loss on ${on}`, tick: v => show(v, 3), show: v => show(v, 3)},
  };
  const most = fraction => Math.max(...points.filter(p => p.fraction === fraction).map(p => p.n_removed));
  section.hidden = false;
  for (const [key, measure] of Object.entries(measures)) if (points.some(p => known(p[key][0]))) choice.append(make("option", {value: key}, measure.name));
  const seeds = [...new Set(points.map(p => p.seeds))].sort((a, b) => a - b);
  section.querySelector("p").textContent = "The samples a method finds most harmful are removed, and the model is trained again from other seeds: mean"
    + ` on ${on} over ${seeds.length > 1 ? `${seeds[0]} to ${seeds.at(-1)}` : seeds[0]} seed${seeds.at(-1) === 1 ? "" : "s"}, with 95 % intervals.`
    + (all.some(curve => curve.control) ? " Dashed: the controls. Grey: nothing removed." : "")
    + removed.filter(curve => curve.points.some(p => p.n_removed < most(p.fraction))).map(curve =>
      ` ${curve.name} has no more than ${count(Math.max(...curve.points.map(p => p.n_removed)))} samples to remove.`).join("")
    + ` ${data.cleaning.notes}`;
  const series = removed.map(curve => ({name: curve.name, colour: colour(curve.name), dash: curve.control ? "6 4" : ""}));
  const start = key => none && none.points[0][key];
  const widest = Math.max(...points.map(p => p.fraction)) || 1;
  const redraw = lines(section.querySelector("figure > svg"), 380, () => {
    const key = choice.value, measure = measures[key], base = key === "gain" ? [0, null, null] : start(key);
    removed.forEach((curve, i) => {
      const values = curve.points.filter(p => known(p[key][0])).map(p => [p.fraction, ...p[key]]);
      // What removes nothing is a level to hold the curves against.
      if (values.length && !values.at(-1)[0]) values.push([widest, ...values.at(-1).slice(1)]);
      series[i].points = [...base && known(base[0]) && values.length && values[0][0] > 0 ? [[0, base[0], null, null]] : [], ...values];
    });
    const drawn = series.filter(s => s.points.length);
    const values = [...drawn.flatMap(s => s.points.flatMap(p => p.slice(1))), ...base || []].filter(known);
    const [low, high] = [Math.min(...values), Math.max(...values)], pad = (high - low) * .05 || .01;
    const y = [low - pad, high + pad];
    return {
      x: [0, widest * 1.04], y, name: "share of the training samples removed", series: drawn,
      xTicks: [...new Set(points.map(p => p.fraction))].sort((a, b) => a - b)
        .map(v => [v, `${Number((100 * v).toFixed(2))} %`]),
      yTicks: ticks(...y, 5).map(v => [v, measure.tick(v)]),
      under: (svg, px, py) => {
        if (!base || !known(base[0])) return;
        const [x1, x2] = [px(0), px(widest * 1.04)];
        if (known(base[1]) && known(base[2])) svg.append(make("rect", {class: "band", x: x1, width: x2 - x1, y: py(base[2]), height: py(base[1]) - py(base[2]), fill: "var(--none)"}));
        svg.append(make("line", {x1, x2, y1: py(base[0]), y2: py(base[0]), stroke: "var(--none)", "stroke-dasharray": "2 4"}));
      },
      at: v => v ? `${Number((100 * v).toFixed(2))} % removed` : "nothing removed",
      show: p => measure.show(p[1]) + (known(p[2]) ? ` [${measure.show(p[2])}, ${measure.show(p[3])}]` : ""),
    };
  });
  const numbers = () => {
    const key = choice.value, fractions = [...new Set(points.map(p => p.fraction))].sort((a, b) => a - b), f = measures[key].show;
    const cell = p => make("td", {}, p && known(p[key][0]) ? f(p[key][0]) + (known(p[key][1]) ? ` [${f(p[key][1])}, ${f(p[key][2])}]` : "") : "–");
    section.querySelector("thead").replaceChildren(make("tr", {}, make("th", {scope: "col"}, "method"), ...fractions.map(v => make("th", {scope: "col"}, percent(v)))));
    section.querySelector("tbody").replaceChildren(...all.map(curve => make("tr", {}, make("td", {}, curve.name),
      ...fractions.map(v => cell(curve.points.find(p => p.fraction === v))))));
  };
  legend(section.querySelector(".legend"), series, redraw);
  choice.addEventListener("change", () => { redraw(); numbers(); });
  numbers();
}

// --- Cost, and the list of sections. ---

{
  const most = Math.max(...data.methods.map(method => method.seconds)) || 1, svg = $("#cost svg");
  plot(svg, data.methods.length * 30 + 4, width => data.methods.forEach((method, i) => {
    const left = Math.min(190, width * .48), long = Math.max(2, method.seconds / most * (width - left - 84));
    svg.append(make("text", {x: left - 8, y: i * 30 + 20, "text-anchor": "end", class: "name"}, labelOf(method)),
      make("rect", {class: "bar", x: left, y: i * 30 + 7, width: long, height: 18, rx: 3}), make("text", {x: left + long + 8, y: i * 30 + 20}, `${show(method.seconds)} s`));
  }));
}
$("nav").append(...[...document.querySelectorAll("section:not([hidden])")].map(section =>
  make("a", {href: `#${section.id}`}, {agreement: "Agreement", samples: "Samples", ranking: "Ranking", groups: "Groups", detection: "Corrupted", cleaning: "Cleaning", cost: "Cost"}[section.id])));
