// --- Finding the corrupted, and cleaning. ---

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
