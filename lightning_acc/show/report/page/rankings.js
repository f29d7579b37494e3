// --- The chosen ranking: how far it can be trusted, its two ends, and another one beside it. ---

const ADVICE = {
  faithful: "The order holds: what stands at its ends can be acted on.",
  rough: "The order holds roughly: retrain without what you mean to drop before you act on it.",
  unreliable: "Do not act on this order: what was retrained without contradicts it.",
  unchecked: "Nobody has checked this order against retraining: take it as a hint.",
};
const gallery = () => {
  const {samples, scores} = chosen().ranking, last = samples.length - 1;
  for (const part of document.querySelectorAll(".gallery")) {
    const place = part.dataset.end === "harmful" ? i => i : i => last - i, all = Math.min(data.shown, samples.length);
    const places = Array.from({length: all}, (_, i) => place(i)), texts = places.some(i => data.samples[samples[i]]?.text);
    part.classList.toggle("texts", texts);
    part.replaceChildren(...places.slice(0, texts ? data.shown / 3 : data.shown).map(i => card(samples[i], [show(scores[i])])));
  }
};
const shares = (first, second) => {
  const common = first.rows.filter(row => !Number.isNaN(second.rank[row])), inSecond = [...common].sort((a, b) => second.rank[a] - second.rank[b]);
  const seen = new Set(), n = common.length, points = [], stops = new Set([10, 50, 100, 500, ...Array.from({length: 120}, (_, i) => Math.max(1, Math.round(n * ((i + 1) / 120) ** 2)))]);
  let both = 0;
  for (let k = 0; k < n; k += 1) {
    for (const row of [common[k], inSecond[k]]) if (seen.has(row)) both += 1; else seen.add(row);
    if (stops.has(k + 1)) points.push([k + 1, both / (k + 1)]);
  }
  const square = common.reduce((sum, row, i) => sum + (i - second.place.get(row)) ** 2, 0);
  return {common, points, spearman: n > 2 ? 1 - 6 * square / (n * (n * n - 1)) : null};
};
let overlap = null, redraw = null;
const compareRankings = () => {
  const against = other(), section = $("#compare");
  section.hidden = !against;
  if (!against) return;
  const first = rankingOf(chosen()), raw = rankingOf(against);
  const inCommon = first.rows.filter(row => !Number.isNaN(raw.rank[row])).sort((a, b) => raw.rank[a] - raw.rank[b]);
  const second = {rank: raw.rank, place: new Map(inCommon.map((row, i) => [row, i]))};
  overlap = shares(first, second);
  const n = overlap.common.length, top = [10, 50, 100, 500].filter(k => k < n), at = k => overlap.points.reduce((a, b) => Math.abs(b[0] - k) < Math.abs(a[0] - k) ? b : a);
  $("#compare p").textContent = n < 3 ? "These two rankings have too few samples in common." : `${labelOf(chosen())} and ${labelOf(against)} have ${count(n)} samples in common; Spearman's correlation of their ranks is ${overlap.spearman.toFixed(2)}.`
    + (top.length ? ` The same are ${top.map(at).map(([k, share]) => `${count(Math.round(k * share))} of the ${count(k)} most harmful`).join(", ")}.` : "");
  $("#compare figure").hidden = n < 3;
  if (n < 3) return;
  const canvas = $("#compare canvas");
  canvas.setAttribute("aria-label", `ranks by ${labelOf(chosen())} across, by ${labelOf(against)} up; Spearman ${overlap.spearman.toFixed(2)}`);
  const side = 260, scale = devicePixelRatio || 1, pen = canvas.getContext("2d");
  canvas.width = canvas.height = side * scale;
  pen.scale(scale, scale);
  pen.fillStyle = getComputedStyle(canvas).color;
  pen.globalAlpha = n > 5000 ? .15 : n > 800 ? .35 : .7;
  const dot = n > 5000 ? 1.2 : n > 800 ? 2 : 3;
  overlap.common.forEach((row, i) => pen.fillRect(i / n * (side - dot), side - dot - second.place.get(row) / n * (side - dot), dot, dot));
  $("#compare .across").textContent = `rank by ${labelOf(chosen())} →`;
  $("#compare .up").textContent = `↑ rank by ${labelOf(against)}`;
  if (redraw) redraw();
  else redraw = lines($("#compare svg"), 290, () => {
    const most = overlap.common.length;
    return {x: [1, most], y: [0, 1], name: "k most harmful", xTicks: [1, ...ticks(1, most, 4).filter(k => k > .1 * most && k < .92 * most && Number.isInteger(k)), most].map(k => [k, count(k)]),
      yTicks: [0, .25, .5, .75, 1].map(v => [v, percent(v, 0)]), series: [{name: "in both", colour: "var(--accent)", dash: "", points: overlap.points}],
      under: (svg, x, y) => svg.append(make("line", {x1: x(1), y1: y(0), x2: x(most), y2: y(1), stroke: "var(--dim)", "stroke-dasharray": "2 4"})),
      at: k => `among the ${count(k)} most harmful of each`, show: p => `${percent(p[1], 0)}`};
  });
};
const rank = () => {
  const method = chosen(), r = method.ranking, part = r.samples.length < r.total;
  $("#extent").textContent = `${count(r.total)} removals of a single sample, ranked by ${labelOf(method)}; rank 1 is the most harmful. `
    + (part ? `This page holds the ${count(r.samples.length / 2)} most harmful and the ${count(r.samples.length / 2)} most helpful of them; all are in scores/${method.name}.parquet. ` : "")
    + "A heading sorts. With the arrow keys you step through the rows, with the space bar you select one, with shift a range.";
  $("#ranking h2").textContent = part ? "Both ends of the ranking" : "The whole ranking";
  for (const option of $("#other").options) option.disabled = option.value !== "" && option.value === $("#method").value;
  if ($("#other").value === $("#method").value) $("#other").value = "";
  named("@rank-other").name = other() ? `rank by ${labelOf(other())}` : "its rank";
  named("@score-other").name = other() ? `score by ${labelOf(other())}` : "its score";
  for (const key of ["@rank-other", "@score-other"]) named(key).width = Math.max(104, 7.5 * named(key).name.length + 30);
  $("#verdict").dataset.word = method.verdict.word;
  $("#verdict b").textContent = method.verdict.word;
  $("#verdict span").textContent = `${method.truth ? "The order is the truth." : ADVICE[method.verdict.word] || ""} ${method.verdict.text[0].toUpperCase()}${method.verdict.text.slice(1)}`
    + (r.uncertainty ? ". The uncertainty is by how much a score may be off" + (method.conditions.runs > 1 ? ": its standard error over the runs." : ".") : "");
  gallery();
  refresh();
  compareRankings();
  if (order.length) detail(order[0]);
};
data.methods.forEach((method, i) => $("#method").append(make("option", {value: i}, labelOf(method))));
$("#other").append(make("option", {value: ""}, "nothing"), ...data.methods.map((method, i) => make("option", {value: i}, labelOf(method))));
$("#compared").hidden = data.methods.length < 2;
for (const choice of ["#method", "#other"]) $(choice).addEventListener("change", rank);
changed = refresh;
rank();
