// The chosen sample: its numbers, its sinks, and what a pruning run kept of it.
report.run = () => report.content.runs[report.state.run];
report.example = () => report.run().examples.find((example) => example.id === report.state.sample) ?? null;
report.decoded = new WeakMap();

// Layer of the explorer: a model may have fewer than another.
report.layer = () => Math.min(report.state.layer, report.run().layers - 1);

// All values of a quantity, layer after layer; null if it was not measured.
report.values = (example, name) => {
  if (!report.decoded.has(example)) report.decoded.set(example, {});
  const known = report.decoded.get(example);
  if (!(name in known)) {
    const text = example.values[name];
    known[name] = text === undefined ? null : report.floats(text, report.quantity(name).inverse);
  }
  return known[name];
};

report.dims = (example, name) => {
  if (!report.decoded.has(example)) report.decoded.set(example, {});
  const known = report.decoded.get(example);
  if (!(name in known)) known[name] = example.dims[name] === undefined ? null : report.indices(example.dims[name]);
  return known[name];
};

// The values of one layer, one for each token.
report.atLayer = (example, name, layer) => {
  const n = example.positions.length;
  return report.values(example, name)?.subarray(layer * n, (layer + 1) * n) ?? null;
};

// Token to role, in one layer.
report.roles = (example, layer) =>
  new Map(example.sinks.filter(([at]) => at === layer).map(([, token, role]) => [token, role]));

// Tokens that a layer sees under the chosen pruning run; null if it sees all of them.
report.kept = (example, layer) => {
  const run = example.pruned.find((each) => each.label === report.state.pruned);
  const before = run?.layers.filter(([first]) => first <= layer) ?? [];
  return before.length ? new Set(before.at(-1)[1]) : null;
};

report.measured = (example) => report.quantities.filter((quantity) => quantity.name in example.values);

// The token of a position in the sequence; -1 if it is none of the sample's visual tokens.
report.tokenAt = (example, position) => (position === null ? -1 : example.positions.indexOf(position));
