// --- Groups that were removed together, and labels and classes. ---

if (data.groups.length) {
  const section = $("#groups");
  section.hidden = false;
  section.querySelector("thead").append(make("tr", {}, ...["group", "samples", "score", "source", "estimate", "method", ""].map(name => name ? make("th", {scope: "col"}, name) : make("td"))));
  section.querySelector("tbody").append(...data.groups.flatMap(table => table.rows.map(row => {
    const name = row.name || row.ids.slice(0, 4).map(id => `#${id}`).join(" ") + (row.samples > 4 ? " …" : "");
    const button = make("button", {type: "button", "aria-label": `show the samples of ${name}`}, row.samples > row.ids.length ? `Show ${count(row.ids.length)}` : "Show");
    button.addEventListener("click", () => filterIds(name, row.ids));
    return make("tr", {}, make("th", {scope: "row"}, name), make("td", {}, count(row.samples)), make("td", {}, show(row.score)),
      make("td", {}, row.source === "estimate" ? "estimate" : "retrained"), make("td", {}, show(row.estimate)), make("td", {}, labelOf(table)), make("td", {}, button));
  })));
}

// Of the words of a column: how many samples, how much they harm; click one to see them.
const parts = columns.filter(column => column.levels && column.levels.length > 1 && column.levels.length <= 30 && !["@name"].includes(column.key));
const summary = () => {
  const column = parts[$("#part").value], {score, rows: own} = rankingOf(chosen()), corrupted = told("corrupted"), yes = corrupted ? corrupted.levels.indexOf("yes") : -1;
  const sums = column.levels.map(() => ({n: 0, sum: 0, harmful: 0, corrupted: 0}));
  for (const row of own) {
    const one = sums[column.codes[row]];
    if (!one || Number.isNaN(score[row])) continue;
    one.n += 1;
    one.sum += score[row];
    if (score[row] < 0) one.harmful += 1;
    if (yes >= 0 && corrupted.codes[row] === yes) one.corrupted += 1;
  }
  $("#classes .levels thead").replaceChildren(make("tr", {}, ...[column.name, "samples", "mean score", "sum of scores", "harmful", ...yes >= 0 ? ["corrupted"] : []].map(name => make("th", {scope: "col"}, name))));
  $("#classes .levels tbody").replaceChildren(...column.sorted.filter(code => sums[code].n).map(code => {
    const one = sums[code], button = make("button", {type: "button", class: "plain", "aria-label": `show the samples with ${column.name} ${column.levels[code]}`}, column.levels[code] || "(empty)");
    button.addEventListener("click", () => filterTo(column.key, column.levels[code]));
    return make("tr", {}, make("th", {scope: "row"}, button), make("td", {}, count(one.n)), make("td", {}, show(one.sum / one.n)), make("td", {}, show(one.sum)),
      make("td", {}, percent(one.harmful / one.n, 0)), ...yes >= 0 ? [make("td", {}, percent(one.corrupted / one.n, 0))] : []);
  }));
};
if (parts.length) {
  $("#classes").hidden = false;
  $("#part").append(...parts.map((column, i) => make("option", {value: i}, column.name)));
  $("#part").addEventListener("change", summary);
  $("#method").addEventListener("change", summary);
  summary();
  const matrix = data.predictions?.matrices.find(one => one.effects), effects = matrix?.effects;
  if (effects) {
    const most = Math.max(...effects.means.flat().map(value => Math.abs(value ?? 0))) || 1;
    $("#effects").hidden = false;
    $("#effects p").textContent = `Across: the label of examples of ${matrix.conditions.query}. Down: the label of training samples. A number is the mean score of such a sample for such an example, by ${matrix.conditions.method}: orange harms, blue helps.`;
    $("#effects thead").append(make("tr", {}, make("th", {scope: "col"}, "label"), ...effects.classes.map(name => make("th", {scope: "col"}, name))));
    $("#effects tbody").append(...effects.labels.map((name, i) => make("tr", {}, make("th", {scope: "row"}, name), ...effects.means[i].map(value => {
      const box = make("td", {}, show(value, 2));
      if (known(value)) box.style.background = `color-mix(in srgb, ${value < 0 ? "var(--bad)" : "var(--accent)"} ${Math.round(45 * Math.sqrt(Math.abs(value) / most))}%, transparent)`;
      return box;
    }))));
  }
}
