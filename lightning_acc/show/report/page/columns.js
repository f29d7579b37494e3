// --- The columns of the table: what was described of the samples, and what the chosen rankings say of them. ---

const collator = new Intl.Collator("en", {numeric: true});
const chosen = () => data.methods[$("#method").value];
const other = () => data.methods[$("#other").value]; // undefined where nothing is compared

const some = values => values.some(value => !Number.isNaN(value));
// Of a method, by row: its ranks and scores, NaN where it has none. Ranks beyond the middle of a cut ranking count from its end.
const rankings = new Map();
const rankingOf = method => {
  if (rankings.has(method)) return rankings.get(method);
  const r = method.ranking, whole = r.samples.length === r.total, empty = () => new Float64Array(size).fill(NaN);
  const found = {rank: empty(), score: empty(), truth: empty(), uncertainty: empty(), rows: r.samples.map(rowOf), most: 1,
    retrained: new Set(r.retrained), diverged: new Set(), total: r.total};
  r.samples.forEach((id, i) => {
    const row = rowOf(id);
    found.rank[row] = whole || i < r.samples.length / 2 ? i + 1 : r.total - r.samples.length + i + 1;
    found.score[row] = r.scores[i] ?? NaN;
    if (r.uncertainty) found.uncertainty[row] = r.uncertainty[i] ?? NaN;
    if (r.diverged?.[i]) found.diverged.add(id);
  });
  for (const [id, truth] of r.truth || []) found.truth[rowOf(id)] = truth ?? NaN;
  found.has = {truth: some(found.truth), uncertainty: some(found.uncertainty)};
  found.most = r.scores.reduce((most, score) => Math.max(most, Math.abs(score ?? 0)), 0) || 1;
  rankings.set(method, found);
  return found;
};

// A column is {key, name, width, values() by row to sort and filter by, text(row)}, of words also levels and codes.
const number = (key, name, width, values, more = {}) =>
  ({key, name, width, values, class: "right", text: row => { const v = values()[row]; return Number.isNaN(v) ? "" : Number.isInteger(v) ? String(v) : show(v); }, ...more});
const ofWords = ({key, name, levels, codes}) => {
  const sorted = levels.map((_, code) => code).sort((a, b) => collator.compare(levels[a], levels[b])), place = new Float64Array(levels.length);
  sorted.forEach((code, i) => { place[code] = i; });
  const values = Float64Array.from(codes, code => code < 0 ? NaN : place[code]);
  const long = levels.reduce((most, level) => Math.max(most, level.length), 0);
  return {key, name, width: Math.max(90, Math.min(190, 8 * Math.max(long, name.length + 2) + 24)), levels, codes, sorted, values: () => values,
    text: row => codes[row] < 0 ? "" : levels[codes[row]]};
};
const given = data.columns.map(column => {
  if (column.levels) return ofWords(column);
  const values = Float64Array.from(column.values, value => value ?? NaN);
  return number(column.key, column.name, Math.max(90, 8 * column.name.length + 40), () => values);
});
const ids = Float64Array.from({length: size}, (_, row) => idAt(row));
const twins = new Float64Array(size);
const same = new Map(data.same.flatMap(group => group.map(id => [id, group.filter(one => one !== id)])));
for (const [id, others] of same) if (rowOf(id) !== undefined) twins[rowOf(id)] = others.length;
const told = name => given.find(column => column.key === name);
const columns = [
  number("@rank", "rank", 78, () => rankingOf(chosen()).rank, {fixed: true}),
  number("@id", "sample", 0, () => ids, {class: "what", fixed: true}),
  number("@score", "score", 190, () => rankingOf(chosen()).score, {fixed: true}),
  ...[told("label")].filter(Boolean).map(column => Object.assign(column, {width: Math.max(130, column.width), class: "label"})),
  number("@truth", "leave-one-out", 124, () => rankingOf(chosen()).truth, {when: () => rankingOf(chosen()).has.truth, fixed: true}),
  number("@uncertainty", "uncertainty", 112, () => rankingOf(chosen()).uncertainty, {when: () => rankingOf(chosen()).has.uncertainty, fixed: true}),
  number("@rank-other", "its rank", 104, () => rankingOf(other()).rank, {when: () => other(), fixed: true}),
  number("@score-other", "its score", 112, () => rankingOf(other()).score, {when: () => other(), fixed: true}),
  ...given.filter(column => column.key !== "label"),
  ...data.same.length ? [number("@same", "same inputs", 118, () => twins)] : [],
];
const named = key => columns.find(column => column.key === key);
const SHOWN_IN_LABEL = ["true_label", "corrupted", "@said", "@name", "@same"];
const visible = new Set([...told("label") ? ["label"] : [], ...given.filter(c => c.key !== "label" && !SHOWN_IN_LABEL.includes(c.key)).slice(0, 3).map(c => c.key)]);
const shownColumns = () => columns.filter(column => (column.fixed || visible.has(column.key)) && (!column.when || column.when()));
