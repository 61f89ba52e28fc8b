// The layer explorer: its controls, and what they show.
report.explorer = { maps: [] };

report.fill = (select, options, chosen) => {
  select.replaceChildren(...options.map(([value, label]) => report.element("option", { value }, label)));
  select.value = chosen;
};

report.outlinePatch = () => report.explorer.maps.forEach((map) => map.outlineChosen());

// The quantity that is shown where the sample lacks the one that was chosen.
report.shownQuantity = (example, name) =>
  name in example.values ? name : report.measured(example)[0]?.name ?? "";

report.listSamples = () => {
  const select = document.getElementById("sample");
  const several = report.content.runs.length > 1;
  const groups = report.content.runs.map((run, number) => {
    const options = run.examples.map((example) =>
      report.element("option", { value: `${number} ${example.id}` }, `${example.question} (${example.id})`));
    return several ? report.element("optgroup", { label: run.name }, ...options) : options;
  });
  select.replaceChildren(...groups.flat());
};

report.showWords = (example) => {
  const text = (id, words) => { document.getElementById(id).textContent = words; };
  const entry = (term, ...words) =>
    report.element("div", {}, report.element("dt", {}, term), report.element("dd", {}, ...words));
  text("question", example.question);
  text("sample-facts", `sample ${example.id}${example.task ? ` · task ${example.task}` : ""}` +
    (report.content.runs.length > 1 ? ` · ${report.run().name}` : ""));
  text("prompt", example.prompt);
  const verdict = example.right === null ? []
    : [" ", report.element("span", { class: example.right ? "right" : "wrong" },
        example.right ? "✓ accepted" : "✗ not among the accepted answers")];
  document.getElementById("answers").replaceChildren(
    entry("model", example.generated || "(nothing)", ...verdict),
    entry("accepted", example.answers.join(", ") || "not known"),
    ...example.pruned.map((run) => entry(run.label, run.answer || "(nothing)")));
  document.getElementById("missing").replaceChildren(
    ...example.missing.map((why) => report.element("p", { class: "missing" }, why)));
};

report.showControls = (example) => {
  const options = report.measured(example).map((quantity) => [quantity.name, quantity.label]);
  const first = report.shownQuantity(example, report.state.first);
  report.fill(document.getElementById("first"), options, first);
  const second = report.state.second in example.values ? report.state.second : "";
  report.fill(document.getElementById("second"), [["", "nothing"], ...options], second);
  document.getElementById("scale").value = report.state.scale;
  const pruned = document.getElementById("pruned");
  report.fill(pruned, [["", "the model itself: all"], ...example.pruned.map(({ label }) => [label, label])], "");
  if (example.pruned.some(({ label }) => label === report.state.pruned)) pruned.value = report.state.pruned;
  for (const id of ["pruned-label", "dropped-legend"]) document.getElementById(id).hidden = !example.pruned.length;
  document.getElementById("sink-legend").hidden = !example.sinks.length && !example.pruned.length;
  document.getElementById("sample").value = `${report.state.run} ${example.id}`;
};

// Pictures and heat maps of the chosen sample; a picture on which nothing can be drawn is shown as it is.
report.buildMaps = (example) => {
  const names = [report.shownQuantity(example, report.state.first)];
  if (report.state.second in example.values) names.push(report.state.second);
  report.explorer.maps = [];
  const views = example.pictures.map((picture) => {
    const label = picture.label || "image";
    const caption = report.element("figcaption", {}, `${label}, as the model sees it`);
    if (picture.grid[0] > 0) caption.append(`; ${picture.grid[0]} × ${picture.grid[1]} visual tokens`);
    const size = { width: picture.width, height: picture.height };
    const view = report.element("div", { class: "view" }, report.element("figure", { class: "original" },
      report.element("img", { src: picture.image, alt: `${label} of sample ${example.id}`, ...size }), caption));
    if (picture.grid[0] > 0 && names[0]) {
      const maps = names.map((name) => new report.HeatMap(example, picture, name));
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
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "The link is in the address bar";
    }
  });
  report.onChange(report.showExplorer);
  report.showExplorer(null);
};
