// Put everything in its place.
report.startTheme = () => {
  const button = document.getElementById("theme");
  const next = { "": "light", light: "dark", dark: "" };
  const show = () => {
    document.documentElement.dataset.theme = report.state.theme;
    button.textContent = `Theme: ${report.state.theme || "as the system"}`;
  };
  button.hidden = false;
  button.addEventListener("click", () => report.change({ theme: next[report.state.theme] }));
  report.onChange((changed) => { if (changed.has("theme")) show(); });
  show();
};

report.start = () => {
  const first = report.content.runs.findIndex((run) => run.examples.length);
  const run = Math.max(first, 0);
  // Where nothing is asked for, a layer in the middle: the first shows little of what a model does.
  Object.assign(report.state, {
    run, sample: report.content.runs[run].examples[0]?.id ?? "", layer: Math.floor(report.content.runs[run].layers / 2),
  });
  const linked = location.hash.includes("=");
  Object.assign(report.state, report.readHash());
  report.startTheme();
  report.startExplorer();
  report.startCharts();
  report.startScatter();
  report.startTables();
  report.startKeys();
  for (const cell of document.querySelectorAll("button.cell")) {
    cell.addEventListener("click", () => report.change({ layer: Number(cell.dataset.layer) }));
  }
  // A link to a section leads there; the view stays in the address.
  addEventListener("hashchange", () => {
    if (location.hash.includes("=")) report.change({ patch: null, pruned: "", ...report.readHash() });
    else report.writeHash();
  });
  if (linked) document.getElementById("explorer").scrollIntoView();
};

report.start();
