// Plots over the decoder's layers, drawn in the width that there is. The layer is shared with the explorer.
report.hovered = null;
report.plots = [];
report.HEIGHT = 240;

report.Plot = class {
  constructor(chart) {
    this.chart = chart;
    this.figure = document.getElementById(`chart-${chart.name}`);
    this.place = this.figure.querySelector(".plot");
    this.several = report.content.runs.length > 1;
    this.figure.querySelector(".csv").addEventListener("click", () => report.download(chart.name, this.rows()));
    this.legend = new report.Legend(chart, this.figure);
  }

  looks(line) { return this.several ? `run-${line.run} ${line.look}` : line.look; }

  label(line) { return this.several ? `${report.content.runs[line.run].name}: ${line.label}` : line.label; }

  rows() {
    const heads = this.chart.lines.flatMap((line) => [this.label(line),
      ...(line.low.length ? [`${this.label(line)}, 5th percentile`, `${this.label(line)}, 95th percentile`] : [])]);
    const rows = [["layer", ...heads]];
    for (let layer = 0; layer < report.layers(); layer++) {
      rows.push([layer, ...this.chart.lines.flatMap((line) =>
        [line.values, ...(line.low.length ? [line.low, line.high] : [])].map((values) => values[layer]))]);
    }
    return rows;
  }

  text(line, layer) {
    const value = line.values[layer] ?? null;
    return this.chart.axis === "cosine" ? report.cosine(value) : report.number(value);
  }

  spoken(layer) {
    return `Layer ${layer}: ` + this.chart.lines.filter((line) => layer < line.values.length)
      .map((line) => `${this.label(line)} ${this.text(line, layer)}`).join(" · ");
  }

  draw() {
    const width = this.place.clientWidth;
    if (!width) return;
    const { chart } = this, n = report.layers(), axis = report.axes[chart.axis];
    const box = { left: 58, right: width - 12, top: 24, bottom: report.HEIGHT - 40 };
    const bands = this.several ? [] : chart.lines.filter((line) => line.low.length);
    const limits = report.limits(chart.axis, [
      ...chart.lines.flatMap((line) => line.values), ...bands.flatMap((line) => [...line.low, ...line.high]),
      ...chart.marks.map(([, value]) => value)].filter((value) => value !== null));
    if (!limits) return;
    this.x = (layer) => box.left + ((layer + 0.5) / n) * (box.right - box.left);
    this.y = (value) => box.bottom - ((axis.place(value) - limits[0]) / (limits[1] - limits[0])) * (box.bottom - box.top);
    this.box = box;
    this.cursor = report.svg("g");
    this.drawing = report.svg("svg", {
      viewBox: `0 0 ${width} ${report.HEIGHT}`, width, height: report.HEIGHT, tabindex: "0", role: "slider",
      "aria-label": `${this.figure.querySelector("h3").textContent}, layer`, "aria-valuemin": 0, "aria-valuemax": n - 1,
    }, ...this.shading(n), ...this.frame(limits, n), ...bands.map((line) => this.band(line)),
    ...this.legend.thresholds.map(([run, value]) => report.svg("line", { class: this.legend.threshold(run),
      x1: box.left, x2: box.right, y1: this.y(value), y2: this.y(value) })), ...chart.lines.flatMap((line) => this.line(line)), this.cursor);
    this.drawing.addEventListener("pointermove", (event) => report.hoverLayer(this.layerAt(event)));
    this.drawing.addEventListener("pointerleave", () => report.hoverLayer(null));
    this.drawing.addEventListener("click", (event) => report.change({ layer: this.layerAt(event) }));
    this.drawing.addEventListener("keydown", report.stepLayer);
    const focused = this.place.contains(document.activeElement);
    this.place.replaceChildren(this.drawing);
    if (focused) this.drawing.focus();
    this.mark();
  }

  layerAt(event) {
    const at = (event.clientX - this.drawing.getBoundingClientRect().left - this.box.left) / (this.box.right - this.box.left);
    const n = report.layers();
    return Math.min(n - 1, Math.max(0, Math.floor(at * n)));
  }

  shading(n) {
    const width = (this.box.right - this.box.left) / n;
    return this.chart.shaded.map((layer) => report.svg("rect", { class: "shaded", x: this.x(layer) - width / 2,
      y: this.box.top, width, height: this.box.bottom - this.box.top }));
  }

  frame(limits, n) {
    const { left, right, top, bottom } = this.box;
    const ticks = report.ticksBetween(this.chart.axis, limits, 7).flatMap(([value]) => [
      report.svg("line", { class: "grid", x1: left, x2: right, y1: this.y(value), y2: this.y(value) }),
      report.svg("text", { class: "tick", x: left - 7, y: this.y(value) + 4, "text-anchor": "end" }, report.tickText(value)),
    ]);
    const every = report.step(Math.max(1, (n * 26) / (right - left)));
    const layers = Array.from({ length: n }, (_, layer) => layer).filter((layer) => layer % every === 0).map((layer) =>
      report.svg("text", { class: "tick", x: this.x(layer), y: bottom + 16, "text-anchor": "middle" }, String(layer)));
    return [...ticks, report.svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }), ...layers,
      report.svg("text", { class: "tick", x: (left + right) / 2, y: bottom + 34, "text-anchor": "middle" },
        "decoder layer (from 0)"),
      report.svg("text", { class: "tick", x: 0, y: 11 }, this.chart.unit)];
  }

  points(values) {
    return values.map((value, layer) => [layer, value])
      .filter(([, value]) => value !== null && Number.isFinite(report.axes[this.chart.axis].place(value)))
      .map(([layer, value]) => [this.x(layer), this.y(value)]);
  }

  line(line) {
    const points = this.points(line.values);
    const looks = this.looks(line);
    const path = report.svg("polyline", { class: `line ${looks}`, points: points.map((at) => at.join(",")).join(" ") });
    return [path, ...points.map(([cx, cy]) => report.svg("circle", { class: `dot ${looks}`, cx, cy, r: 2.6 }))];
  }

  band(line) {
    const there = this.points(line.high), back = this.points(line.low).reverse();
    return report.svg("polygon", { class: `band ${this.looks(line)}`,
      points: [...there, ...back].map((at) => at.join(",")).join(" ") });
  }

  // The chosen layer, and the one that is pointed at.
  mark() {
    if (!this.drawing) return;
    const shown = report.hovered ?? report.state.layer;
    const upright = (layer, looks) => report.svg("line",
      { class: looks, x1: this.x(layer), x2: this.x(layer), y1: this.box.top, y2: this.box.bottom });
    const rings = this.chart.lines.filter((line) => Number.isFinite(this.y(line.values[shown] ?? NaN))).map((line) =>
      report.svg("circle", { class: `ring ${this.looks(line)}`, cx: this.x(shown), cy: this.y(line.values[shown]), r: 5 }));
    this.cursor.replaceChildren(upright(report.state.layer, "cursor chosen"),
      ...(report.hovered === null ? [] : [upright(shown, "cursor")]), ...rings);
    const text = this.spoken(shown);
    this.figure.querySelector(".readout").textContent = this.several ? `Layer ${shown}` : text;
    this.legend.say((line) => (shown < line.values.length ? this.text(line, shown) : "–"));
    this.drawing.setAttribute("aria-valuenow", shown);
    this.drawing.setAttribute("aria-valuetext", text);
  }
};

report.hoverLayer = (layer) => {
  if (layer === report.hovered) return;
  report.hovered = layer;
  report.plots.forEach((plot) => plot.mark());
};

report.stepLayer = (event) => {
  const last = report.layers() - 1, at = report.state.layer;
  const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: last }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  report.hovered = null;
  report.change({ layer: Math.min(last, Math.max(0, to)) });
};

report.startCharts = () => {
  report.plots = report.content.charts.filter((chart) => chart.lines.length).map((chart) => new report.Plot(chart));
  const resized = new ResizeObserver((entries) => entries.forEach((entry) => {
    const plot = report.plots.find((each) => each.place === entry.target);
    if (plot && plot.width !== plot.place.clientWidth) {
      plot.width = plot.place.clientWidth;
      plot.draw();
    }
  }));
  report.plots.forEach((plot) => resized.observe(plot.place));
  report.onChange((changed) => { if (changed.has("layer")) report.plots.forEach((plot) => plot.mark()); });
};
