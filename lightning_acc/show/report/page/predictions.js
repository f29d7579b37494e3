// --- Single predictions: the examples of a matrix, and the samples that helped and harmed the one that is picked. ---

if (data.predictions) {
  const section = $("#predictions"), {matrices, examples} = data.predictions, find = selector => section.querySelector(selector);
  const select = find("select"), list = find(".list"), input = find("input"), status = find("[role=status]");
  const moment = at => ({end: "the end of the run", along: "steps along the run"}[at] || (at.startsWith("along:") ? `${at.slice(6)} steps along the run` : /^\d/.test(at) ? `step ${at}` : `the averaged parameters (${at})`));
  const nameOf = one => one.conditions.method + (one.conditions.query === "val" ? "" : ` on ${one.conditions.query}`)
    + when(one.conditions.at) + ` (${one.conditions.readout} readout)`;
  let matrix = null, place = -1; // of the picked example in the matrix' own order

  const about = number => examples[matrix.about][number];
  const short = (what, shown) => what.length > shown ? `${what.slice(0, shown)} …` : what;
  const wrong = one => make("span", {class: "flip"}, `said ${short(one.said, 40)}`);
  const image = (source, alt) => {
    const found = make("img", {src: source, alt});
    found.addEventListener("load", () => found.classList.toggle("fine", found.naturalWidth > 48));
    return found;
  };
  const option = (number, i) => {
    const one = about(number), text = make("div", {class: "who"}, make("div", {class: "line"}, make("b", {}, `#${number}`),
      make("span", {class: "number"}, known(one.loss) ? show(one.loss) : "")));
    const label = make("div", {}, one.label === undefined ? "" : short(one.label, 40));
    if (one.said !== undefined) label.append(" ", wrong(one));
    text.append(label);
    if (!one.image && one.text) text.append(make("small", {}, short(one.text, 70)));
    const box = make("div", {role: "option", id: `example-${i}`, "data-example": number, "aria-selected": "false"});
    if (one.image) box.append(image(one.image, ""));
    box.append(text);
    box.addEventListener("click", () => pick(i, true));
    return box;
  };
  // Not scrollIntoView, which scrolls the page too.
  const reveal = item => {
    const [box, inner] = [list.getBoundingClientRect(), item.getBoundingClientRect()];
    list.scrollTop += Math.min(0, inner.top - box.top - 6) + Math.max(0, inner.bottom - box.bottom + 6);
    list.scrollLeft += Math.min(0, inner.left - box.left - 6) + Math.max(0, inner.right - box.right + 6);
  };
  const nearby = (what, score) => {
    if (typeof what === "number") return card(what, [show(score)]);
    const more = what.n - what.samples.length;
    return make("div", {class: "sample"}, make("div", {}, what.n ? `${count(what.n)} samples removed together` : "nothing removed"),
      make("div", {class: "number"}, what.samples.map(i => `#${i}`).join(" ") + (more ? ` and ${count(more)} more` : "")), make("div", {class: "number"}, show(score)));
  };
  const half = (title, near, scores, none) => {
    const box = make("div", {class: "near"}, ...near.map((what, i) => nearby(what, scores[i])));
    box.classList.toggle("texts", near.some(what => typeof what !== "number" || data.samples[what]?.text));
    return [make("h3", {}, title), near.length ? box : make("p", {}, none)];
  };
  const detail = () => {
    const number = matrix.numbers[place], [helped, up, harmed, down] = matrix.rows[place], one = about(number);
    const facts = make("div", {class: "facts"}, make("h3", {}, `Example #${number}`));
    if (one.text) facts.append(words(one.text, 400));
    const row = (name, ...value) => facts.append(make("div", {}, make("span", {class: "number"}, `${name} `), ...value));
    if (one.label !== undefined) row("label", one.label);
    if (one.corrupted) row("", make("span", {class: "flip"}, was(one)));
    if (matrix.classes) row("the model", one.said === undefined ? "said so too" : wrong(one));
    if (known(one.loss)) row("loss", show(one.loss), place ? `, number ${count(place + 1)} of ${count(matrix.total)} from the highest` : `, the highest of ${count(matrix.total)}`);
    const head = make("div", {class: "example"});
    if (one.image) head.append(image(one.image, `example ${number}`));
    head.append(facts);
    const near = [...new Set([...helped, ...harmed].filter(what => typeof what === "number"))];
    const button = make("button", {type: "button", class: "to-table"}, `Show these ${near.length} samples in the ranking`);
    button.addEventListener("click", () => filterIds(`samples of example #${number}`, near));
    find(".picked").replaceChildren(head, ...near.length ? [button] : [],
      ...half("Helped it most: without them its loss would be higher", helped, up, "Nothing that was asked about helped it."),
      ...half("Harmed it most: without them its loss would be lower", harmed, down, "Nothing that was asked about harmed it."));
    said.textContent = [...head.querySelectorAll("h3, .facts > div")].map(part => part.textContent).join(", ");
  };
  const pick = (i, byHand) => {
    list.children[place]?.setAttribute("aria-selected", "false");
    place = i;
    const item = list.children[place];
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    input.value = matrix.numbers[place];
    status.textContent = "";
    detail();
    reveal(item);
    const which = matrix === matrices[0] ? "" : `&by=${encodeURIComponent(matrix.name)}`;
    if (byHand) history.replaceState(null, "", `#prediction=${matrix.numbers[place]}${which}`);
  };
  const choose = which => {
    const before = matrix && matrix.numbers[place];
    matrix = which;
    select.value = matrices.indexOf(which);
    place = -1;
    const c = matrix.conditions, all = matrix.numbers.length, value = matrix.losses ? "loss" : `value of ${c.query}`;
    const parts = matrix.groups ? `${count(matrix.removals)} removals, groups among them` : matrix.removals < matrix.n_samples
      ? `only ${count(matrix.removals)} of the ${count(matrix.n_samples)} training samples` : `all ${count(matrix.n_samples)} training samples`;
    find(".about").replaceChildren(`The ${count(matrix.total)} examples of ${c.query}, ${matrix.losses ? "those with the highest loss at the end of the run first" : "those first that some removal moves most"}, and for each the `
      + `training samples that made its prediction what it is. A score is the example's ${value} without the sample minus its ${value} with it, at ${moment(c.at)}: `,
      make("b", {}, "positive helps, negative harms"), `. Asked about were ${parts} (${c.dtype}). `, matrix.missing,
      all < matrix.total ? ` This page has room for the first ${count(all)}; all are in matrices/${matrix.name}.safetensors.` : "",
      matrix.pictured < all ? ` Pictures and texts of all their samples are here for ${count(matrix.pictured)} of them; of the others, what else is known.` : "");
    const verdict = find(".verdict");
    verdict.dataset.word = matrix.verdict.word;
    verdict.querySelector("b").textContent = matrix.verdict.word;
    verdict.querySelector("span").textContent = matrix.verdict.text + (matrix.truth || matrix.verdict.word === "unchecked" ? "" : " (the mean over the examples)");
    input.max = Math.max(...matrix.numbers);
    list.replaceChildren(...matrix.numbers.map(option));
    pick(Math.max(0, matrix.numbers.indexOf(before)), false);
  };
  const named = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!asked.has("prediction")) return;
    const which = matrices.find(one => one.name === asked.get("by")) || matrices[0];
    if (which !== matrix) choose(which);
    go(Number(asked.get("prediction")), false);
    section.scrollIntoView();
  };
  const go = (number, byHand) => {
    const i = matrix.numbers.indexOf(number);
    if (i < 0) status.textContent = "is not here";
    else pick(i, byHand);
  };
  list.addEventListener("keydown", event => {
    const last = matrix.numbers.length - 1;
    const moves = {ArrowDown: place + 1, ArrowRight: place + 1, ArrowUp: place - 1, ArrowLeft: place - 1, Home: 0, End: last, PageDown: place + 10, PageUp: place - 10};
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    pick(Math.max(0, Math.min(last, moves[event.key])), true);
    event.preventDefault();
  });
  input.addEventListener("change", () => go(input.valueAsNumber, true));
  select.addEventListener("change", () => { choose(matrices[select.value]); pick(place, true); });
  matrices.forEach((one, i) => select.append(make("option", {value: i}, nameOf(one))));
  if (matrices[0].numbers.length) {
    section.hidden = false;
    choose(matrices[0]);
    named();
    addEventListener("hashchange", named);
  }
}
