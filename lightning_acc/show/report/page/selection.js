// --- Selected samples: boxes, ranges, all that is shown; copied and downloaded as ids or CSV. ---

const selected = new Set();
let anchor = 0; // the place where a range begins
const everything = make("input", {type: "checkbox", "aria-label": "select all samples that are shown"});
const select = (place, on, ranged) => {
  const [from, to] = ranged ? [Math.min(anchor, place), Math.max(anchor, place)] : [place, place];
  for (let i = from; i <= to && i < order.length; i += 1) if (on) selected.add(order[i]); else selected.delete(order[i]);
  if (!ranged) anchor = place;
  tellSelection();
};
const selectAll = on => {
  for (const row of order) if (on) selected.add(row); else selected.delete(row);
  tellSelection();
};
const tellSelection = () => {
  for (const [place, tr] of made) {
    const on = selected.has(order[place]);
    tr.setAttribute("aria-selected", on);
    tr.querySelector("input").checked = on;
  }
  let here = 0;
  for (const row of order) if (selected.has(row)) here += 1;
  everything.checked = here > 0 && here === order.length;
  everything.indeterminate = here > 0 && here < order.length;
  $("#count").textContent = selected.size ? `${count(selected.size)} selected` : "none selected";
  for (const button of $("#act").querySelectorAll("button")) button.disabled = !selected.size;
};
everything.addEventListener("click", () => selectAll(everything.checked));

// The most harmful first, whatever the table is sorted by; what this ranking does not know comes last.
const picked = () => { const {rank} = rankingOf(chosen()); return [...selected].sort((a, b) => (rank[a] || Infinity) - (rank[b] || Infinity) || a - b); };
const asIds = () => picked().map(row => `${idAt(row)}\n`).join("");
// What a table program would compute as a formula stands after an apostrophe, as in the package's own CSV files.
const cell = value => {
  const text = typeof value === "string" && /^[=+\-@\t\r\n]/.test(value) && (value.trim() === "" || Number.isNaN(Number(value))) ? `'${value}` : String(value ?? "");
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
const asCsv = () => {
  const method = chosen(), r = rankingOf(method), plain = value => Number.isNaN(value) || value === undefined ? "" : value;
  const truths = r.has.truth, unsure = r.has.uncertainty, second = other() && rankingOf(other());
  const own = ["rank", "sample", "score", "source", ...truths ? ["loo"] : [], ...unsure ? ["uncertainty"] : [], ...second ? [`rank by ${labelOf(other())}`, `score by ${labelOf(other())}`] : []];
  const lines = picked().map(row => [r.rank[row], idAt(row), r.score[row], method.truth || r.retrained.has(idAt(row)) ? "loo" : "estimate", ...truths ? [r.truth[row]] : [],
    ...unsure ? [r.uncertainty[row]] : [], ...second ? [second.rank[row], second.score[row]] : []].map(plain)
    .concat(given.map(column => column.levels ? column.text(row) : plain(column.values()[row]))));
  const header = [...own, ...given.map(column => own.includes(column.name) ? `described_${column.name}` : column.name)];
  return `# ${labelOf(method)}, ${method.verdict.word}: ${method.verdict.text}\n${[header, ...lines].map(one => one.map(cell).join(",")).join("\n")}\n`;
};
const download = (name, kind, text) => {
  const url = URL.createObjectURL(new Blob([text], {type: kind})), link = make("a", {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};
const copy = async text => {
  try { await navigator.clipboard.writeText(text); } catch {
    const area = make("textarea", {class: "unseen", "aria-hidden": "true"});
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
};
$("#copy").addEventListener("click", async () => { await copy(asIds()); $("#count").textContent = `${count(selected.size)} ids copied`; });
$("#ids").addEventListener("click", () => download("ids.txt", "text/plain", asIds()));
$("#csv").addEventListener("click", () => download("samples.csv", "text/csv", asCsv()));
$("#clear").addEventListener("click", () => { selected.clear(); $("#chosen").checked = false; refresh(); });
