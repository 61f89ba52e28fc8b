// What the reader has chosen. It lies in the address, after #, so that a link leads to the same view.
report.state = {
  run: 0, sample: "", layer: 0, first: "attention", second: "contribution", scale: "layer", pruned: "", patch: null,
  theme: "", sort: "",
};
report.listeners = [];
report.onChange = (listener) => report.listeners.push(listener);

report.layers = () => Math.max(...report.content.runs.map((run) => run.layers));

report.change = (part) => {
  const before = { ...report.state };
  Object.assign(report.state, part);
  const changed = Object.keys(report.state).filter((name) => report.state[name] !== before[name]);
  if (!changed.length) return;
  report.writeHash();
  for (const listener of report.listeners) listener(new Set(changed));
};

report.hash = () => {
  // An empty second quantity is a choice; the other empty ones are as if nothing was said.
  const parts = Object.entries(report.state).filter(([name, value]) => name === "second" || (value !== "" && value !== null));
  return new URLSearchParams(parts).toString();
};

report.link = () => `${location.href.split("#")[0]}#${report.hash()}`;

report.writeHash = () => {
  clearTimeout(report.later);
  try {
    history.replaceState(null, "", `#${report.hash()}`);
  } catch {
    // Safari refuses the hundredth change within some seconds, which a slider soon makes; the view goes on without it.
    report.later = setTimeout(report.writeHash, 2000);
  }
};

// A choice that this page does not offer is passed over.
report.readHash = () => {
  const given = new URLSearchParams(location.hash.slice(1));
  const part = {};
  const whole = (name, below) => {
    const value = Number(given.get(name));
    if (given.has(name) && Number.isInteger(value) && value >= 0 && value < below) part[name] = value;
  };
  whole("run", report.content.runs.length);
  whole("layer", report.layers());
  whole("patch", Infinity);
  if (part.run !== undefined && !report.content.runs[part.run].examples.length) delete part.run;
  const run = report.content.runs[part.run ?? report.state.run];
  if (run.examples.some((example) => example.id === given.get("sample"))) part.sample = given.get("sample");
  else if (part.run !== undefined && part.run !== report.state.run) part.sample = run.examples[0].id;
  for (const name of ["first", "second"]) if (report.quantity(given.get(name))) part[name] = given.get(name);
  if (given.get("second") === "") part.second = "";
  if (["layer", "all"].includes(given.get("scale"))) part.scale = given.get("scale");
  if (["light", "dark"].includes(given.get("theme"))) part.theme = given.get("theme");
  for (const name of ["pruned", "sort"]) if (given.has(name)) part[name] = given.get(name);
  return part;
};
