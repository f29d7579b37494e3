// --- Line charts. ---

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
