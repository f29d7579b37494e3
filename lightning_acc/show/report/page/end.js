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
  make("a", {href: `#${section.id}`}, {agreement: "Agreement", samples: "Samples", ranking: "Ranking", predictions: "Predictions", groups: "Groups", classes: "Labels", "over-time": "Over training", detection: "Corrupted", cleaning: "Cleaning", cost: "Cost"}[section.id])));
