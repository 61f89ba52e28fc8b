// Letters, while the focus is in the explorer and not in a field that takes them itself.
report.startKeys = () => {
  const explorer = document.getElementById("explorer");
  explorer.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input:not([type=range])") || event.ctrlKey || event.metaKey || event.altKey) return;
    const example = report.example();
    if (!example) return;
    const layer = (by) => report.change({
      layer: Math.min(report.run().layers - 1, Math.max(0, report.layer() + by)),
    });
    const sample = (by) => {
      const all = report.content.runs.flatMap((run, number) => run.examples.map((each) => [number, each]));
      const at = all.findIndex(([, each]) => each === example);
      const [run, next] = all[(at + by + all.length) % all.length];
      report.change({ run, sample: next.id, patch: null });
    };
    const quantity = () => {
      const names = report.measured(example).map(({ name }) => name);
      const at = names.indexOf(report.shownQuantity(example, report.state.first));
      report.change({ first: names[(at + 1) % names.length] });
    };
    const acts = {
      j: () => layer(1),
      k: () => layer(-1),
      n: () => sample(1),
      p: () => sample(-1),
      q: quantity,
      s: () => report.change({ scale: report.state.scale === "all" ? "layer" : "all" }),
      Escape: () => report.change({ patch: null }),
    };
    if (!(event.key in acts)) return;
    event.preventDefault();
    const map = report.explorer.maps.findIndex((each) => each.map === document.activeElement);
    acts[event.key]();
    // A new sample or quantity makes new maps: the focus stays where it was.
    if (map >= 0) (report.explorer.maps[map] ?? report.explorer.maps[0])?.map.focus({ preventScroll: true });
  });
};
