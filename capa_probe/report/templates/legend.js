// What the lines of a plot stand for. Of several runs, the legend is a table that holds the numbers at the layer as well.
report.Legend = class {
  constructor(chart, figure) {
    this.chart = chart;
    this.several = report.content.runs.length > 1;
    this.cells = [];
    // One threshold, if it is the same for all runs.
    const { marks } = chart;
    const same = marks.length > 1 && new Set(marks.map(([, , label]) => label)).size === 1;
    this.thresholds = same ? [[null, ...marks[0].slice(1)]] : marks;
    const place = figure.querySelector(".legend");
    const lines = this.several ? [] : chart.lines.map((line) => this.entry(`line ${line.look}`, line.label));
    place.replaceChildren(...lines, ...this.thresholds.map(([run, , label]) =>
      this.entry(this.threshold(run), this.several && run !== null ? `${report.isolate(this.name(run))}: ${label}` : label)));
    if (this.several) place.before(this.table());
  }

  name(run) { return report.content.runs[run].name; }

  threshold(run) { return this.several && run !== null ? `threshold run-${run}` : "threshold"; }

  // A piece of a line, as it is drawn in the plot.
  dash(looks) {
    return report.svg("svg", { class: "dash", viewBox: "0 0 28 8", "aria-hidden": "true" },
      report.svg("line", { class: looks, x1: 0, x2: 28, y1: 4, y2: 4 }));
  }

  entry(looks, label) { return report.element("li", {}, this.dash(looks), ` ${label}`); }

  // A row for each run, a column for each kind of line.
  table() {
    const { lines } = this.chart;
    this.cells = lines.map((line) => ({ line, cell: report.element("td", { class: "numeric" }) }));
    const kinds = [...new Map(lines.map((line) => [line.label, line.look]))];
    const cell = (run, kind) => this.cells.find(({ line }) => line.run === run && line.label === kind)?.cell
      ?? report.element("td", { class: "numeric" }, "–");
    const head = kinds.map(([label, look]) => report.element("th", { scope: "col", class: "numeric" },
      this.dash(`line ${look} no-run`), " ", label));
    const rows = [...new Set(lines.map((line) => line.run))].map((run) => report.element("tr", {},
      report.element("th", { scope: "row" }, report.element("i", { class: `swatch run-${run}` }), " ",
        report.element("bdi", {}, this.name(run))), ...kinds.map(([label]) => cell(run, label))));
    return report.element("div", { class: "scroll" }, report.element("table", { class: "numbers legend-table" },
      report.element("thead", {}, report.element("tr", {}, report.element("td"), ...head)),
      report.element("tbody", {}, ...rows)));
  }

  // Fill the cells in: what a line says, as a text.
  say(text) {
    for (const { line, cell } of this.cells) cell.textContent = text(line);
  }
};
