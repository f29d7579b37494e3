// --- One sample: what is known of it, its card, and the tip beside the pointer. ---

const described = new Map(data.columns.map(column => [column.key, column]));
const size = typeof data.ids === "number" ? data.ids : data.ids.length;
const rows = typeof data.ids === "number" ? null : new Map(data.ids.map((id, row) => [id, row]));
const idAt = row => rows ? data.ids[row] : row;
const rowOf = id => rows ? rows.get(id) : id;
const word = (key, id) => {
  const column = described.get(key), row = rowOf(id);
  return column && row !== undefined && column.codes[row] >= 0 ? column.levels[column.codes[row]] : undefined;
};
const sampleOf = id => ({label: word("label", id), true_label: word("true_label", id), corrupted: word("corrupted", id) === "yes",
  name: word("@name", id), said: word("@said", id), ...data.samples[id]});

const picture = (id, source) => {
  const image = make("img", {src: source, alt: `sample ${id}`});
  image.addEventListener("load", () => image.classList.toggle("fine", image.naturalWidth > 48));
  return image;
};
const words = (text, shown) => {
  if (text.length <= shown) return make("div", {class: "text"}, text);
  const button = make("button", {class: "text", type: "button", "aria-expanded": "false"}, text);
  button.addEventListener("click", () => button.setAttribute("aria-expanded", button.getAttribute("aria-expanded") === "false"));
  return button;
};
const called = id => { const {name} = sampleOf(id); return name === undefined ? `#${id}` : `#${id} ${name}`; };
const was = sample => sample.true_label === undefined || sample.true_label === sample.label ? "corrupted" : `was ${sample.true_label}`;
// Which label may be the right one: that before a known corruption, or what the model says at the end of the run.
const suggestion = sample => sample.corrupted ? make("div", {class: "flip"}, was(sample))
  : sample.said !== undefined && sample.label !== undefined && sample.said !== sample.label ? make("div", {class: "says"}, `model says ${sample.said}`) : null;
const card = (id, lines) => {
  const sample = sampleOf(id), box = make("div", {class: "sample" + (sample.corrupted ? " corrupted" : "")});
  if (sample.image) box.append(picture(id, sample.image));
  if (sample.text) box.append(words(sample.text, 200));
  box.append(make("div", {}, (sample.label === undefined ? "" : `${sample.label} · `) + called(id)));
  const other = suggestion(sample);
  if (other) box.append(other);
  box.append(...lines.map(line => make("div", {class: "number"}, line)));
  return box;
};
const tip = $("#tip"), said = $("#said");
const hide = () => { tip.hidden = true; };
const tell = (x, y, content, aloud) => {
  tip.replaceChildren(content);
  tip.hidden = false;
  const left = x + 16 + tip.offsetWidth > document.documentElement.clientWidth - 8 ? x - 16 - tip.offsetWidth : x + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
  if (aloud) said.textContent = [...content.querySelectorAll("div, tr")].map(part => part.textContent).join(", ") || content.textContent;
};
// What pointing at, touching, focusing and stepping through a chart have in common. `nearest` maps a place in the chart to
// an index or -1; `at` shows an index, or nothing for -1; `size` counts the indices.
const explore = (svg, size, nearest, at) => {
  let index = -1;
  const go = (next, aloud) => { index = next; at(index, aloud); if (index < 0) hide(); };
  const point = event => {
    const box = svg.getBoundingClientRect();
    go(nearest(event.clientX - box.left, event.clientY - box.top), false);
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => go(-1));
  svg.addEventListener("blur", () => go(-1));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible") && size()) go(Math.max(0, index), true); });
  svg.addEventListener("keydown", event => {
    const moves = {ArrowRight: index + 1, ArrowUp: index + 1, ArrowLeft: index - 1, ArrowDown: index - 1, Home: 0, End: size() - 1};
    if (event.key === "Escape") go(-1);
    else if (event.key in moves && size()) {
      go(Math.max(0, Math.min(size() - 1, moves[event.key])), true);
      event.preventDefault();
    }
  });
};
addEventListener("scroll", hide, {passive: true});
