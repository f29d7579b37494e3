// --- The table: only the rows in sight are made. Rows are of one height, which `--row` says. ---

const ROW = 56, AROUND = 4;
const state = {sort: "@rank", down: false, at: 0}; // `at` is the place of the row that has the focus
let order = new Int32Array(0), made = new Map(), headed = "", shown = [];
const box = $("#sheet"), body = $("#rows tbody");
const gap = () => make("tr", {class: "gap", "aria-hidden": "true"}, make("td"));
const [above, below] = [gap(), gap()];

const cells = {
  "@id": row => {
    const id = idAt(row), sample = sampleOf(id), about = make("div", {class: "about"}), entry = make("div", {class: "entry"});
    if (sample.image) entry.append(picture(id, sample.image));
    about.append(make("span", {class: "number"}, called(id)));
    if (sample.text) about.append(make("div", {class: "text"}, sample.text));
    entry.append(about);
    return [entry];
  },
  label: row => {
    const sample = sampleOf(idAt(row)), hint = suggestion(sample);
    return [sample.label ?? "", ...hint ? [hint] : []];
  },
  "@score": row => {
    const {score, most, retrained, diverged} = rankingOf(chosen()), value = score[row], share = Math.abs(value || 0) / most * 50;
    const bar = make("i"), meter = make("span", {class: "meter", "aria-hidden": "true"}, bar);
    bar.style.width = `${share}%`;
    bar.style.left = `${value < 0 ? 50 - share : 50}%`;
    const sign = retrained.has(idAt(row)) ? ["✓", "retrained without: the true score"] : diverged.has(idAt(row)) ? ["⚠", "diverged: the estimate left the region where it can be true"] : null;
    return [meter, make("span", {class: "value"}, Number.isNaN(value) ? "–" : show(value)),
      make("span", {class: "sign"}, ...sign ? [make("span", {title: sign[1], "aria-hidden": "true"}, sign[0]), make("span", {class: "unseen"}, sign[1])] : [])];
  },
  "@truth": row => [show(Number.isNaN(rankingOf(chosen()).truth[row]) ? null : rankingOf(chosen()).truth[row])],
};
const line = place => {
  const row = order[place], id = idAt(row), tick = make("input", {type: "checkbox", tabindex: -1, "aria-label": `select sample ${called(id)}`});
  tick.checked = selected.has(row);
  tick.addEventListener("click", event => { event.stopPropagation(); select(place, tick.checked, event.shiftKey); });
  const tr = make("tr", {"data-sample": id, "aria-rowindex": place + 2, "aria-selected": selected.has(row), tabindex: -1}, make("td", {class: "tick"}, tick),
    ...shown.map(column => make("td", {class: column.class || ""}, ...cells[column.key] ? cells[column.key](row) : [column.text(row)])));
  tr.addEventListener("click", () => go(Number(tr.getAttribute("aria-rowindex")) - 2, false));
  return tr;
};
const paint = () => {
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - AROUND), last = Math.min(order.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + AROUND);
  const now = new Map();
  for (let place = first; place < last; place += 1) now.set(place, made.get(place) || line(place));
  if (order.length && state.at >= 0 && !now.has(state.at) && made.get(state.at)?.contains(document.activeElement)) box.focus({preventScroll: true});
  for (const [place, tr] of made) if (now.get(place) !== tr) tr.remove();
  let before = above;
  for (const [place, tr] of now) {
    if (before.nextSibling !== tr) before.after(tr);
    tr.tabIndex = place === state.at ? 0 : -1;
    tr.classList.toggle("at", place === state.at);
    before = tr;
  }
  made = now;
  above.firstChild.style.height = `${first * ROW}px`;
  below.firstChild.style.height = `${Math.max(0, order.length - last) * ROW}px`;
};
const head = () => {
  shown = shownColumns();
  const key = shown.map(column => column.key).join(" ");
  $("#rows thead tr").replaceChildren(make("th", {scope: "col", class: "tick"}, everything), ...shown.map(column => {
    const sorted = state.sort === column.key, button = make("button", {type: "button"}, column.name, make("span", {"aria-hidden": "true"}, !sorted ? "" : state.down ? " ↓" : " ↑"));
    button.addEventListener("click", () => {
      state.down = sorted && !state.down;
      state.sort = column.key;
      refresh();
      $(`#rows th[data-key="${CSS.escape(column.key)}"] button`).focus();
    });
    const cell = make("th", {scope: "col", "data-key": column.key, class: column.class || ""}, button);
    if (sorted) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    return cell;
  }));
  if (key === headed) return;
  headed = key;
  const texts = shown.some(column => column.key === "@id") && data.methods[0].ranking.samples.slice(0, 50).some(id => data.samples[id]?.text);
  const what = texts ? (innerWidth < 600 ? 190 : 300) : innerWidth < 600 ? 130 : 150, narrow = innerWidth < 600 ? {"@rank": 66, "@score": 104} : {}, width = column => narrow[column.key] || column.width;
  $("#rows colgroup").replaceChildren(...[40, ...shown.map(column => column.key === "@id" ? 0 : width(column))].map(wide => make("col", wide ? {width: wide} : {})));
  $("#rows").style.minWidth = `${40 + shown.reduce((sum, column) => sum + (column.key === "@id" ? what : width(column)), 0)}px`;
  $("#rows").classList.toggle("texts", texts);
};
const refresh = () => {
  if (!shownColumns().some(column => column.key === state.sort)) Object.assign(state, {sort: "@rank", down: false});
  const keys = named(state.sort).values(), {rank, rows: own} = rankingOf(chosen()), sign = state.down ? -1 : 1;
  const kept = own.filter(passes);
  // What is not known comes last either way.
  kept.sort((a, b) => Number.isNaN(keys[a]) || Number.isNaN(keys[b]) ? Number.isNaN(keys[a]) - Number.isNaN(keys[b]) || rank[a] - rank[b]
    : (keys[a] - keys[b]) * sign || rank[a] - rank[b]);
  order = Int32Array.from(kept);
  state.at = 0;
  made.forEach(tr => tr.remove());
  made = new Map();
  head();
  for (const one of [above, below]) one.firstChild.colSpan = shown.length + 1;
  $("#rows").setAttribute("aria-rowcount", order.length + 1);
  $("#nothing").hidden = order.length > 0;
  $("#range").textContent = order.length === own.length ? `${count(order.length)} samples` : `${count(order.length)} of ${count(own.length)} samples`;
  box.scrollTop = 0;
  paint();
  tellSelection();
};
const go = (place, focus = true) => {
  if (!order.length) return;
  state.at = Math.max(0, Math.min(order.length - 1, place));
  const top = state.at * ROW, room = box.clientHeight - $("#rows thead").offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top;
  else if (top + ROW > box.scrollTop + room) box.scrollTop = top + ROW - room;
  paint();
  if (focus) made.get(state.at)?.focus({preventScroll: true});
  detail(order[state.at]);
};
body.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" && event.key === " ") return;
  const page = Math.max(1, Math.floor(box.clientHeight / ROW) - 1);
  const moves = {ArrowDown: state.at + 1, ArrowUp: state.at - 1, PageDown: state.at + page, PageUp: state.at - page, Home: 0, End: order.length - 1};
  if (event.key === " ") select(state.at, !selected.has(order[state.at]), event.shiftKey);
  else if (event.key === "a" && (event.ctrlKey || event.metaKey)) selectAll(true);
  else if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
    if (event.shiftKey) select(state.at, true, false);
    go(moves[event.key]);
    if (event.shiftKey) select(state.at, true, true);
  } else return;
  event.preventDefault();
});
box.addEventListener("scroll", paint, {passive: true});
new ResizeObserver(() => paint()).observe(box);
body.append(above, below);
