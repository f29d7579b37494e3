// --- Influence over training: the query, and below it what the extreme samples had contributed by then. ---

if (data.over_time) {
  const section = $("#over-time"), {query, steps, curve, lines: gathered} = data.over_time, last = steps.at(-1);
  const [above, below] = section.querySelectorAll("figure"), whole = ticks(0, last, 5).filter(Number.isInteger).map(t => [t, count(t)]);
  const harmful = gathered.filter(line => line.harmful).length;
  section.hidden = false;
  // Nothing has trained over what the last steps saw.
  const at = steps.findIndex(t => t >= .95 * last), late = gathered.filter(({gathered: g}) => Math.abs(g.at(-1) - g[at]) > Math.abs(g.at(-1)) / 2).length;
  section.querySelector("p").textContent = `When the ${harmful} most harmful and the ${gathered.length - harmful} most helpful samples made a difference to ${query},`
    + " visit by visit, beside what it was by then. Switch lines off and on by their names; the arrow keys step through them."
    + (2 * late > gathered.length ? ` ${late} of them owe more than half of their score to the last twentieth of the training, which no later step has worn off: a ranking`
      + " along the run (at=\"along\", --at along) tells more about the samples, and less about their order." : "");
  above.querySelector("figcaption").textContent = `The query ${query}, mean over its examples`;
  const range = values => {
    const seen = values.filter(known), low = Math.min(...seen), high = Math.max(...seen), pad = (high - low) * .05 || 1e-9;
    return [low - pad, high + pad];
  };
  const chart = (y, series) => ({
    x: [0, last], y, xTicks: whole, yTicks: ticks(...y, 4).map(v => [v, short(v)]), name: "optimizer steps", series,
    under: (svg, px, py) => { if (y[0] < 0 && y[1] > 0) svg.append(make("line", {class: "zero", x1: px(0), x2: px(last), y1: py(0), y2: py(0)})); },
    at: t => `after ${count(t)} steps`, show: p => show(p[1]),
  });
  const read = curve.filter(point => known(point[1]));
  lines(above.querySelector("svg"), 170, () => chart(range(read.map(p => p[1])), [{name: query, colour: "var(--ink)", dash: "", points: read}]));
  // The first of each kind is drawn in full, the next ones in ever shorter dashes, so that they can be told apart.
  const dashes = ["", "9 3", "6 3", "3 3", "1 3"], seen = {true: 0, false: 0};
  const series = gathered.map(line => ({
    name: called(line.sample) + (known(sampleOf(line.sample).label) ? ` · ${sampleOf(line.sample).label}` : ""),
    colour: `var(--${line.harmful ? "bad" : "accent"})`, dash: dashes[seen[line.harmful]++ % dashes.length],
    points: steps.map((t, i) => [t, line.gathered[i]]).filter(p => known(p[1])),
  }));
  const redraw = lines(below.querySelector("svg[tabindex]"), 340, () => {
    const visible = series.filter(s => !s.off);
    return chart(range([0, ...visible.flatMap(s => s.points.map(p => p[1]))]), series);
  });
  legend(below.querySelector(".legend"), series, redraw);
}
