// --- One sample beside the table: all that is known of it, and what every ranking says. ---

const detail = row => {
  const id = idAt(row), sample = sampleOf(id), panel = $("#detail"), facts = make("dl", {class: "plain"});
  const add = (name, value) => facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  const others = same.get(id) || [];
  panel.replaceChildren(make("h3", {}, called(id)));
  if (sample.image) panel.append(picture(id, sample.image));
  if (sample.text) panel.append(make("p", {class: "whole"}, sample.text));
  if (sample.label !== undefined) add("label", sample.label);
  const hint = suggestion(sample);
  if (hint) panel.append(make("p", {class: "hint"}, hint, sample.corrupted ? "the label before a known corruption" : "Another label? The class this run itself gives the sample at its end."));
  for (const column of given) if (!["label", "@name"].includes(column.key) && column.text(row) !== "") add(column.name, column.text(row));
  panel.append(facts);
  if (others.length) {
    const list = make("p", {class: "same"}, `Made of the same: `);
    for (const one of others.slice(0, 12)) {
      const label = sampleOf(one).label, button = make("button", {type: "button"}, `#${one}` + (label === undefined ? "" : ` · ${label}`));
      button.classList.toggle("flip", label !== sample.label);
      button.addEventListener("click", () => filterIds(`made of the same as #${id}`, [id, ...others]));
      list.append(button, " ");
    }
    if (others.length > 12) list.append(`and ${count(others.length - 12)} more`);
    panel.append(list);
  }
  const list = make("tbody");
  for (const method of data.methods) {
    const r = rankingOf(method);
    if (!Number.isNaN(r.rank[row])) list.append(make("tr", {}, make("th", {scope: "row"}, labelOf(method)), make("td", {}, Number.isNaN(r.score[row]) ? "–" : show(r.score[row])), make("td", {}, `${count(r.rank[row])} of ${count(r.total)}`)));
  }
  panel.append(make("table", {"aria-label": "what the rankings say of it"}, make("thead", {}, make("tr", {}, ...["ranking", "score", "rank"].map(name => make("th", {scope: "col"}, name)))), list));
};
