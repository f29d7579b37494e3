// --- Search and filters: which rows are shown. `changed` is what to do when they change. ---

const MANY = 200; // levels that a list to choose from may have
const filters = [];
let sought = [], changed = () => {};
const haystacks = new Map();
const haystack = row => {
  if (!haystacks.has(row)) haystacks.set(row, [idAt(row), data.samples[idAt(row)]?.text || "", ...given.filter(c => c.levels).map(c => c.text(row))].join("\n").toLowerCase());
  return haystacks.get(row);
};
const found = row => sought.every(one => /^#\d+$/.test(one) ? String(idAt(row)) === one.slice(1) : haystack(row).includes(one));
const passes = row => (!$("#harmful").checked || rankingOf(chosen()).score[row] < 0) && (!$("#chosen").checked || selected.has(row))
  && filters.every(filter => filter.test(row)) && (!sought.length || found(row));
const input = (attributes, name, act) => {
  const box = make("input", {...attributes, "aria-label": name});
  box.addEventListener("input", () => { act(box.value); changed(); });
  return box;
};
const chooser = (column, filter) => {
  const box = make("select", {"aria-label": column.name, "data-column": column.key}), counts = new Int32Array(column.levels.length);
  for (const code of column.codes) if (code >= 0) counts[code] += 1;
  // The values have a letter before them, so that an empty word differs from all words.
  box.append(make("option", {value: ""}, "all"), ...column.sorted.map(code => make("option", {value: `=${column.levels[code]}`}, `${column.levels[code]} (${count(counts[code])})`)));
  box.addEventListener("change", () => {
    const code = column.levels.indexOf(box.value.slice(1));
    filter.test = box.value === "" ? () => true : row => column.codes[row] === code;
    changed();
  });
  return [box];
};
const range = (column, filter) => {
  let low = -Infinity, high = Infinity;
  filter.test = row => (low === -Infinity && high === Infinity) || (column.values()[row] >= low && column.values()[row] <= high);
  return [input({type: "number", step: "any", placeholder: "from", "data-column": column.key}, `${column.name} from`, value => { low = value === "" ? -Infinity : Number(value); }),
    input({type: "number", step: "any", placeholder: "to", "data-column": column.key}, `${column.name} to`, value => { high = value === "" ? Infinity : Number(value); })];
};
const containing = (column, filter) => [input({type: "search", placeholder: "contains", "data-column": column.key}, `${column.name} contains`,
  value => { const part = value.toLowerCase(); filter.test = row => column.text(row).toLowerCase().includes(part); })];
const filterBy = key => {
  const before = filters.find(filter => filter.key === key);
  if (before) return before;
  const column = named(key), filter = {key, test: () => true}, away = make("button", {type: "button", class: "away", "aria-label": `remove the filter by ${column.name}`}, "×");
  const controls = !column.levels ? range(column, filter) : column.levels.length > MANY ? containing(column, filter) : chooser(column, filter);
  filter.node = make("div", {class: "filter", role: "group", "aria-label": `filter by ${column.name}`}, make("span", {}, column.name), ...controls, away);
  filter.box = controls[0];
  away.addEventListener("click", () => { filters.splice(filters.indexOf(filter), 1); filter.node.remove(); changed(); $("#by").focus(); });
  filters.push(filter);
  $("#filters").append(filter.node);
  if (!column.fixed) visible.add(key);
  return filter;
};
const filterTo = (key, level) => {
  const filter = filterBy(key);
  filter.box.value = filter.box.tagName === "SELECT" ? `=${level}` : level;
  filter.box.dispatchEvent(new Event(filter.box.tagName === "SELECT" ? "change" : "input"));
  $("#ranking").scrollIntoView();
};
// A filter for ids that stand elsewhere on the page: a group, or the samples of one prediction.
const filterIds = (name, list) => {
  const before = filters.find(filter => filter.key === "@among");
  if (before) { filters.splice(filters.indexOf(before), 1); before.node.remove(); }
  const wanted = new Set(list.map(rowOf)), away = make("button", {type: "button", class: "away", "aria-label": `remove the filter by ${name}`}, "×");
  const filter = {key: "@among", test: row => wanted.has(row), node: make("div", {class: "filter"}, make("span", {}, name), away)};
  away.addEventListener("click", () => { filters.splice(filters.indexOf(filter), 1); filter.node.remove(); changed(); });
  filters.push(filter);
  $("#filters").append(filter.node);
  changed();
  $("#ranking").scrollIntoView();
};
$("#by").append(make("option", {value: ""}, "column …"), ...columns.filter(column => !column.when && column.key !== "@id").map(column => make("option", {value: column.key}, column.name)));
$("#by").addEventListener("change", () => {
  if ($("#by").value === "") return;
  filterBy($("#by").value).box.focus();
  $("#by").value = "";
  changed();
});
let waiting;
$("#search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { sought = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean); changed(); }, 120);
});
for (const box of ["#harmful", "#chosen"]) $(box).addEventListener("change", () => changed());
$("#show-columns").append(...columns.filter(column => !column.fixed).map(column => {
  const box = make("input", {type: "checkbox", "data-key": column.key});
  box.checked = visible.has(column.key);
  box.addEventListener("change", () => { if (box.checked) visible.add(column.key); else visible.delete(column.key); changed(); });
  return make("label", {}, box, ` ${column.name}`);
}));
$("#columns-menu").hidden = !$("#show-columns").children.length;
if (told("label") && told("label").levels.length > 1 && told("label").levels.length <= 1000) filterBy("label");
