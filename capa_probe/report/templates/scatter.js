// Attention against contribution of visual tokens in the chosen layer.
report.Scatter = class {
  constructor(across, up) {
    Object.assign(this, { across, up });
    this.figure = document.getElementById("chart-attention_contribution");
    this.place = this.figure.querySelector(".plot");
    this.several = report.content.runs.length > 1;
    this.figure.hidden = false;
    this.figure.querySelector(".csv").addEventListener("click", () =>
      report.download(`attention-contribution-layer-${report.state.layer}`, [
        ["run", "role", "attention", "contribution"],
        ...this.points().map(({ run, role, x, y }) =>
          [report.content.runs[run].name, role || "no sink", report.exact(x), report.exact(y)])]));
  }

  words(role) {
    return { "": "other visual tokens", dump: "Probability Dumps", anchor: "Structural Anchors" }[role] ?? "undetermined sinks";
  }

  groups() {
    return report.content.runs.flatMap((run, number) =>
      Object.entries(run.points.layers[report.state.layer] ?? {}).map(([role, group]) => ({ run: number, role, ...group })));
  }

  points() {
    return this.groups().flatMap(({ run, role, attention, contribution }) => {
      const y = report.floats(contribution);
      return Array.from(report.floats(attention), (x, i) => ({ run, role, x, y: y[i] }));
    }).filter(({ x, y }) => x > 0 && y > 0);
  }

  // Ordinary tokens first, and those of several runs in turn, so that none hides another.
  inTurn() {
    const points = this.points(), seen = {};
    for (const point of points) {
      const group = `${point.run} ${point.role}`;
      seen[group] = (seen[group] ?? 0) + 1;
      point.turn = seen[group];
    }
    return points.sort((one, two) => Boolean(one.role) - Boolean(two.role) || one.turn - two.turn);
  }

  draw() {
    const width = this.place.clientWidth, height = 300;
    document.getElementById("scatter-layer").textContent = report.state.layer;
    if (!width) return;
    const box = { left: 58, right: width - 12, top: 24, bottom: height - 40 };
    const { across, up } = this;
    const x = (value) => box.left + ((Math.log10(value) - across[0]) / (across[1] - across[0])) * (box.right - box.left);
    const y = (value) => box.bottom - ((Math.log10(value) - up[0]) / (up[1] - up[0])) * (box.bottom - box.top);
    const points = this.inTurn();
    const drawing = report.svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `Attention against contribution of ${points.length} visual tokens in layer ${report.state.layer}` });
    for (const [value] of report.ticksBetween("log", up, 7)) {
      drawing.append(report.svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
        report.svg("text", { class: "tick", x: box.left - 7, y: y(value) + 4, "text-anchor": "end" }, report.tickText(value)));
    }
    for (const [value] of report.ticksBetween("log", across, Math.floor(width / 70))) {
      drawing.append(report.svg("text", { class: "tick", x: x(value), y: box.bottom + 16, "text-anchor": "middle" },
        report.tickText(value)));
    }
    drawing.append(report.svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
      report.svg("text", { class: "tick", x: (box.left + box.right) / 2, y: box.bottom + 34, "text-anchor": "middle" },
        "attention (probability)"),
      report.svg("text", { class: "tick", x: 0, y: 11 }, "contribution (L2 norm)"));
    const shapes = { "": "M-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0", dump: "M-5-4h10L0 5z",
      anchor: "M-5 4h10L0-5z", undetermined: "M-4-4h8v8h-8z" };
    this.drawn = points.map((point) => ({ ...point, left: x(point.x), top: y(point.y) }));
    for (const { run, role, left, top } of this.drawn) {
      const looks = `point ${this.several ? `run-${run}` : ""} ${role || "other"}`;
      drawing.append(report.svg("path", { class: looks, d: shapes[role], transform: `translate(${left} ${top})` }));
    }
    drawing.addEventListener("pointermove", (event) => this.read(event, drawing));
    drawing.addEventListener("pointerleave", () => this.sayAll());
    this.place.replaceChildren(drawing);
    this.legend(shapes);
    this.sayAll();
  }

  legend(shapes) {
    this.figure.querySelector(".legend").replaceChildren(...this.groups().map(({ run, role, n, attention }) => {
      const looks = `point ${this.several ? `run-${run}` : ""} ${role || "other"}`;
      const drawn = report.floats(attention).length;
      const of = drawn < n ? `${drawn} of ${n.toLocaleString("en")}` : n.toLocaleString("en");
      const name = this.several ? `${report.isolate(report.content.runs[run].name)}: ` : "";
      return report.element("li", {},
        report.svg("svg", { class: "dash", viewBox: "-14 -6 28 12", "aria-hidden": "true" },
          report.svg("path", { class: looks, d: shapes[role] })), ` ${name}${this.words(role)} (${of})`);
    }));
  }

  sayAll() {
    this.figure.querySelector(".readout").textContent = `Layer ${report.state.layer}: ${this.drawn.length} points`;
  }

  // The nearest point, if it is near.
  read(event, drawing) {
    const corner = drawing.getBoundingClientRect();
    const away = ({ left, top }) => Math.hypot(left - event.clientX + corner.left, top - event.clientY + corner.top);
    const nearest = this.drawn.reduce((best, point) => (best && away(best) <= away(point) ? best : point), null);
    if (!nearest || away(nearest) > 14) return this.sayAll();
    const role = nearest.role ? this.words(nearest.role).replace(/s$/, "") : "visual token";
    this.figure.querySelector(".readout").textContent =
      `${role}: attention ${report.number(nearest.x)}, contribution ${report.number(nearest.y)}`;
  }
};

report.startScatter = () => {
  // The same axes in every layer, so that layers can be compared.
  const every = report.content.runs.flatMap((run) => run.points.layers.flatMap((layer) => Object.values(layer)));
  const [across, up] = ["attention", "contribution"].map((name) =>
    report.limits("log", every.flatMap((group) => Array.from(report.floats(group[name])))));
  if (!across || !up) return;
  const scatter = new report.Scatter(across, up);
  let width = 0;
  new ResizeObserver(() => {
    if (scatter.place.clientWidth !== width) {
      width = scatter.place.clientWidth;
      scatter.draw();
    }
  }).observe(scatter.place);
  report.onChange((changed) => { if (changed.has("layer")) scatter.draw(); });
};
