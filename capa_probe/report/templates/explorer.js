// The layer explorer: its controls, and what they show.
report.explorer = { maps: [] };

report.outlinePatch = () => report.explorer.maps.forEach((map) => map.outlineChosen());

// The quantity that is shown where the sample lacks the one that was chosen.
report.shownQuantity = (example, name) =>
  name in example.values ? name : report.measured(example)[0]?.name ?? "";

report.listSamples = () => {
  const select = document.getElementById("sample");
  const several = report.content.runs.length > 1;
  const groups = report.content.runs.map((run, number) => {
    const options = run.examples.map((example) =>
      report.element("option", { value: `${number} ${example.id}` },
        `${report.isolate(example.question)} (${report.isolate(example.id)})`));
    return several ? report.element("optgroup", { label: report.isolate(run.name) }, ...options) : options;
  });
  select.replaceChildren(...groups.flat());
};

report.showWords = (example) => {
  const text = (id, words) => { document.getElementById(id).textContent = words; };
  const entry = (term, ...words) =>
    report.element("div", {}, report.element("dt", {}, term), report.element("dd", {}, ...words));
  text("question", example.question);
  text("sample-facts", `sample ${report.isolate(example.id)}${example.task ? ` · task ${report.isolate(example.task)}` : ""}` +
    (report.content.runs.length > 1 ? ` · ${report.isolate(report.run().name)}` : ""));
  text("prompt", example.prompt);
  const verdict = example.right === null ? []
    : [" ", report.element("span", { class: example.right ? "right" : "wrong" },
        example.right ? "✓ accepted" : "✗ not among the accepted answers")];
  document.getElementById("answers").replaceChildren(
    entry("model", report.element("bdi", {}, example.generated || "(nothing)"), ...verdict),
    entry("accepted answers", example.answers.join(", ") || "not known"),
    ...example.pruned.map((run) => entry(run.label, run.answer || "(nothing)")));
  document.getElementById("missing").replaceChildren(
    ...example.missing.map((why) => report.element("p", { class: "missing" }, why)));
};

// What can be shown, and, so that a reader knows of them, the main quantities that were not measured.
report.quantityOptions = (example) => {
  const options = report.measured(example).map(({ name, label }) => report.element("option", { value: name }, label));
  const others = report.quantities.filter(({ name, main }) => main && !(name in example.values));
  return [...options, ...others.map(({ name, label }) =>
    report.element("option", { value: name, disabled: "" }, `${label} (not measured)`))];
};

report.showControls = (example) => {
  const choose = (id, options, chosen) => {
    const select = document.getElementById(id);
    select.replaceChildren(...options);
    select.value = chosen;
  };
  const option = (value, label) => report.element("option", { value }, label);
  choose("first", report.quantityOptions(example), report.shownQuantity(example, report.state.first));
  const second = report.state.second in example.values ? report.state.second : "";
  choose("second", [option("", "nothing"), ...report.quantityOptions(example)], second);
  document.getElementById("scale").value = report.state.scale;
  const labels = example.pruned.map(({ label }) => label);
  choose("pruned", [option("", "the model itself: all"), ...labels.map((label) => option(label, label))],
    labels.includes(report.state.pruned) ? report.state.pruned : "");
  document.getElementById("sample").value = `${report.state.run} ${example.id}`;
  const show = (selector, shown) => document.querySelectorAll(selector).forEach((each) => { each.hidden = !shown; });
  show("#pruned-label, #dropped-legend", example.pruned.length);
  show(".sink-legend", example.sinks.length);
  show("#no-sinks", report.run().sinks_known && !example.sinks.length);
};

// Pictures and heat maps of the chosen sample; a picture on which nothing can be drawn is shown as it is.
report.buildMaps = (example) => {
  const names = [report.shownQuantity(example, report.state.first)];
  if (report.state.second in example.values) names.push(report.state.second);
  report.explorer.maps = [];
  let image = "";
  const views = example.pictures.map((picture) => {
    image = picture.image || image; // a thumbnail is of the same image as the tiles
    const drawn = picture.grid[0] > 0 && names[0];
    const label = picture.label || "image";
    const what = report.element("figcaption", {}, picture.image ? `${label}, as the model sees it` : label);
    if (picture.grid[0] > 0) what.append(`; ${picture.grid[0]} × ${picture.grid[1]} visual tokens`);
    const size = { width: picture.width, height: picture.height };
    const shown = picture.image || !drawn
      ? [report.element("img", { src: image, alt: `${label} of sample ${example.id}`, ...size })] : [];
    const wide = picture.image && picture.width > 1.8 * picture.height ? " wide" : "";
    const view = report.element("div", { class: `view${wide}` },
      report.element("figure", { class: "original" }, ...shown, what));
    if (drawn) {
      const maps = names.map((name) => new report.HeatMap(example, picture, image, name));
      report.explorer.maps.push(...maps);
      view.append(report.element("div", { class: "panels" }, ...maps.map((map) => map.figure)));
    }
    return view;
  });
  document.getElementById("pictures").replaceChildren(...views);
};

report.showLayer = () => {
  const slider = document.getElementById("layer");
  slider.max = report.run().layers - 1;
  slider.value = report.layer();
  slider.setAttribute("aria-valuetext", `layer ${report.layer()}`);
  document.getElementById("layer-number").textContent = `${report.layer()} (of 0–${slider.max})`;
  report.explorer.maps.forEach((map) => map.draw(report.layer()));
  report.showPatch();
};

report.showExplorer = (changed) => {
  const example = report.example();
  if (!example) return;
  const anew = !changed || ["run", "sample", "first", "second"].some((name) => changed.has(name));
  if (anew) {
    report.pointed = -1;
    report.showWords(example);
    report.buildMaps(example);
  }
  if (anew || changed.has("pruned") || changed.has("scale")) report.showControls(example);
  report.showLayer();
};

report.tokenRows = (example) => {
  const names = report.measured(example).map((quantity) => quantity.name);
  const dims = Object.keys(example.dims);
  const n = example.positions.length;
  const rows = [["sample", "layer", "position", "image", "tile", "row", "col", "role", ...names, ...dims]];
  for (let layer = 0; layer < report.run().layers; layer++) {
    const roles = report.roles(example, layer);
    for (let token = 0; token < n; token++) {
      const at = layer * n + token;
      rows.push([example.id, layer, example.positions[token], ...example.places[token], roles.get(token) ?? "",
        ...names.map((name) => report.exact(report.values(example, name)[at])),
        ...dims.map((name) => report.dims(example, name)[at])]);
    }
  }
  return rows;
};

report.startExplorer = () => {
  const card = document.getElementById("explorer-card");
  if (!card) return;
  card.hidden = false;
  report.listSamples();
  const on = (id, event, act) => document.getElementById(id).addEventListener(event, act);
  on("sample", "change", (event) => {
    const [run, ...id] = event.target.value.split(" ");
    report.change({ run: Number(run), sample: id.join(" "), patch: null });
  });
  on("layer", "input", (event) => report.change({ layer: Number(event.target.value) }));
  for (const name of ["first", "second", "scale", "pruned"]) {
    on(name, "change", (event) => report.change({ [name]: event.target.value }));
  }
  on("download-tokens", "click", () => {
    const example = report.example();
    report.download(`tokens-${example.id.replace(/[^\w.-]+/g, "_")}`, report.tokenRows(example));
  });
  on("copy", "click", async (event) => {
    const button = event.currentTarget;
    report.writeHash();
    try {
      await navigator.clipboard.writeText(report.link());
      button.textContent = "Copied";
    } catch {
      button.textContent = "The link is in the address bar";
    }
  });
  report.onChange(report.showExplorer);
  report.showExplorer(null);
};
