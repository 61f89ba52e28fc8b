// One quantity over one picture: the picture in grey, a colour for each patch, outlines of sinks and of the chosen patch.
report.HeatMap = class {
  constructor(example, picture, image, name) {
    Object.assign(this, { example, picture, name });
    this.quantity = report.quantity(name);
    const [rows, cols] = picture.grid;
    this.canvas = report.element("canvas", { width: cols, height: rows });
    this.marks = report.svg("svg", { viewBox: `0 0 ${cols} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    this.map = report.element("div",
      { class: "map", tabindex: "0", role: "application", "aria-describedby": "patch" },
      report.element("img", { src: image, alt: "", width: picture.width, height: picture.height }),
      this.canvas, this.marks);
    // A tall picture is drawn narrower.
    this.map.style.setProperty("--aspect", picture.width / picture.height);
    this.bar = report.element("canvas", { class: "bar", width: 128, height: 1, "aria-hidden": "true" });
    this.low = report.element("span"), this.high = report.element("span");
    const rule = { sqrt: "colour: square root of the value", linear: "colour: linear", cosine: "colour: logarithmic in 1 − cosine" };
    this.figure = report.element("figure", { class: "panel" }, this.map,
      report.element("figcaption", {},
        report.element("b", {}, this.quantity.label), ` ${this.quantity.unit}`, this.bar,
        report.element("span", { class: "ends" }, this.low, report.element("span", {}, rule[this.quantity.scale]),
          this.high)));
    this.map.addEventListener("pointermove", (event) => report.point(this.tokenAt(event)));
    this.map.addEventListener("pointerleave", () => report.point(-1));
    this.map.addEventListener("click", (event) => this.choose(this.tokenAt(event)));
    this.map.addEventListener("keydown", (event) => this.move(event));
  }

  tokenAt(event) {
    const box = this.map.getBoundingClientRect();
    const [rows, cols] = this.picture.grid;
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const col = Math.floor(((event.clientX - box.left) / box.width) * cols);
    return row >= 0 && row < rows && col >= 0 && col < cols ? this.picture.cells[row * cols + col] : -1;
  }

  choose(token) {
    if (token >= 0) report.change({ patch: this.example.positions[token] });
  }

  move(event) {
    const [rows, cols] = this.picture.grid;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const at = this.picture.cells.indexOf(report.tokenAt(this.example, report.state.patch));
    const inside = (value, n) => Math.min(n - 1, Math.max(0, value));
    // From nowhere, the first step leads to the first patch.
    const cell = at < 0 ? this.picture.cells.findIndex((token) => token >= 0)
      : inside(Math.floor(at / cols) + step[0], rows) * cols + inside((at % cols) + step[1], cols);
    report.pointed = -1;
    this.choose(this.picture.cells[cell]);
  }

  draw(layer) {
    const all = report.values(this.example, this.name), here = report.atLayer(this.example, this.name, layer);
    const range = report.range(this.quantity.scale, report.state.scale === "all" ? all : here);
    const image = new ImageData(this.canvas.width, this.canvas.height);
    this.picture.cells.forEach((token, cell) => {
      const value = token < 0 ? NaN : here[token];
      if (range && !Number.isNaN(value)) {
        image.data.set(report.colour(report.share(this.quantity.scale, range, value)), 4 * cell);
      }
    });
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    this.drawBar();
    [this.low, this.high].forEach((element, end) => {
      element.textContent = range ? report.show(this.name, range[end]) : "–";
    });
    this.drawMarks(layer);
    const largest = range ? `, from ${this.low.textContent} to ${this.high.textContent}` : ", no values";
    this.map.setAttribute("aria-label",
      `${this.quantity.label} in layer ${layer}${largest}; arrow keys move over the patches`);
  }

  // The colours as they look over a picture of middle grey; linear in the value, but for cosines, where the middle of
  // the bar is the middle of the colours.
  drawBar() {
    const scale = this.quantity.scale === "cosine" ? "linear" : this.quantity.scale;
    const context = this.bar.getContext("2d");
    context.fillStyle = "rgb(70 70 70)";
    context.fillRect(0, 0, this.bar.width, 1);
    for (let x = 0; x < this.bar.width; x++) {
      const [red, green, blue, alpha] = report.colour(
        report.share(scale, [0, this.bar.width - 1], x));
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${alpha / 255})`;
      context.fillRect(x, 0, 1, 1);
    }
  }

  drawMarks(layer) {
    const roles = report.roles(this.example, layer), kept = report.kept(this.example, layer);
    const cols = this.picture.grid[1];
    const outlines = [], dropped = [];
    this.picture.cells.forEach((token, cell) => {
      const x = cell % cols, y = Math.floor(cell / cols);
      if (token < 0) return;
      if (kept && !kept.has(token)) dropped.push(`M${x} ${y}h1v1h-1z`);
      if (roles.has(token)) outlines.push(this.outline(x, y, `mark ${roles.get(token)}`, token));
    });
    this.chosen = report.svg("g", { class: "mark chosen" });
    this.marks.replaceChildren(report.svg("path", { class: "dropped", d: dropped.join("") }), ...outlines, this.chosen);
    this.outlineChosen();
  }

  outline(x, y, looks, token, inset = 0) {
    const box = { x: x + inset, y: y + inset, width: 1 - 2 * inset, height: 1 - 2 * inset };
    return report.svg("g", { class: looks, "data-token": token },
      report.svg("rect", { class: "casing", ...box }), report.svg("rect", box));
  }

  outlineChosen() {
    const cell = this.picture.cells.indexOf(report.shownToken());
    const cols = this.picture.grid[1];
    this.chosen.replaceChildren(
      ...(cell < 0 || report.shownToken() < 0 ? []
        : [...this.outline(cell % cols, Math.floor(cell / cols), "", 0, 0.12).childNodes])); // a sink's outline stays
  }
};
