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
      const dot = make("circle", {class: "dot" + (sampleOf(id).corrupted ? " corrupted" : ""), "data-sample": id, cx: x(truth).toFixed(1), cy: y(estimate).toFixed(1), r: 3.2});
      if (!dots.has(id)) dots.set(id, new Set());
      dots.get(id).add(dot);
      return {id, truth, estimate, dot, x: x(truth), y: y(estimate)};
    });
    // The corrupted are few: they lie on top.
    svg.append(...places.filter(p => !sampleOf(p.id).corrupted).map(p => p.dot), ...places.filter(p => sampleOf(p.id).corrupted).map(p => p.dot));
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
