"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const unit = data.measure.unit ? ` ${data.measure.unit}` : "";
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };

  // Theme: as the system has it until the button says otherwise.
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (systemIsDark.matches ? "dark" : "light")) === "dark";
  const tellTheme = () => document.dispatchEvent(new Event("theme"));
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    tellTheme();
  });
  systemIsDark.addEventListener("change", tellTheme);

  // What is folded opens for a link to it, for the button, and for paper.
  const reveal = (element) => {
    for (let each = element; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    element?.scrollIntoView();
  };
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.id.startsWith("cell-") && target.dataset.row) open(Number(target.dataset.row));
    else if (target) reveal(target);
  };
  addEventListener("hashchange", follow);
  const unfold = document.getElementById("unfold");
  unfold.addEventListener("click", () => {
    const opening = unfold.textContent === "Open all";
    for (const each of document.querySelectorAll("main details:not(.sources)")) each.open = opening;
    unfold.textContent = opening ? "Close all" : "Open all";
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("main details:not([open]):not(.sources):not(.cells)")];
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of opened) each.open = false;
  });
  const copy = async (button) => {
    const text = button.nextElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // to be copied by hand
    }
  };

  // Tables: a heading sorts by the numbers of its column where it has some, else by its texts; what is empty goes last.
  const texts = new Intl.Collator(undefined, { numeric: true });
  const sort = (heading) => {
    const table = heading.closest("table");
    const column = [...heading.parentElement.children].indexOf(heading);
    const numeric = heading.classList.contains("number");
    const first = numeric ? "descending" : "ascending";
    const other = { ascending: "descending", descending: "ascending" };
    const direction = other[heading.getAttribute("aria-sort")] || first;
    for (const each of heading.parentElement.children) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      const value = cell.dataset.value;
      return { row, key: numeric ? (value === "" ? null : Number(value)) : cell.textContent.trim() };
    });
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return sign * (numeric ? a.key - b.key : texts.compare(a.key, b.key));
    });
    table.tBodies[0].append(...keyed.map(({ row }) => row));
  };
  const filter = (input) => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of input.closest(".part").querySelectorAll("tbody tr")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const rows = [...input.closest(".part").querySelectorAll("tbody tr")];
    input.nextElementSibling.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a, [data-cell]");
    if (target?.matches(".sort")) sort(target.closest("th"));
    if (target?.matches(".copy")) copy(target);
    if (target?.dataset.cell) open(Number(target.dataset.cell));
    if (location.hash && target?.getAttribute("href") === location.hash) follow(); // no change of it, so no event
  });
  document.addEventListener("input", (event) => {
    if (event.target.classList.contains("filter")) filter(event.target);
  });

  // A cell: the runs behind it.
  const dialog = document.getElementById("cell");
  const digits = (value) =>
    value === null ? "" : (Number.isInteger(value) ? value : Number(value.toPrecision(5))).toString();
  const shades = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C510A"];
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const ticks = (low, high) => {
    const raw = (high - low) / 4 || 1;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
    return Array.from({ length: 9 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((value) => value <= high);
  };
  const curves = (runs) => {
    const [width, height, left, bottom] = [640, 260, 52, 40];
    const lines = runs.flatMap((run, i) =>
      run.axis === undefined ? [] : [
        { run, i, of: data.measure.images, y: run.values, dash: run.state === "done" ? "" : "1 3" },
        ...(run.train.length ? [{ run, i, of: "training", y: run.train, dash: "6 4" }] : []),
      ],
    );
    const points = lines.flatMap(({ run, y }) => y.map((value, k) => [data.axes[run.axis][k], value]));
    const known = points.filter(([, value]) => value !== null);
    const range = (values) => [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
    const [[x0, x1], [y0, y1]] = known.length ? [0, 1].map((k) => range(known.map((point) => point[k]))) : [[0, 1], [0, 1]];
    const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - 10);
    const y = (value) => height - bottom - ((value - y0) / (y1 - y0 || 1)) * (height - bottom - 10);
    const label = data.measure.label.replace(`${data.measure.images} `, "") + (unit && ` (${data.measure.unit})`);
    const text = (at, words, attributes = {}) => svg("text", { x: at[0], y: at[1], "text-anchor": "middle", ...attributes }, words);
    return svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, class: "curves", role: "img", "aria-label": `${label} by epoch of ${runs.length} runs` },
      ...ticks(x0, x1).map((value) => text([x(value), height - bottom + 16], digits(value))),
      ...ticks(y0, y1).flatMap((value) => [
        svg("line", { x1: left, x2: width - 10, y1: y(value), y2: y(value) }),
        text([left - 6, y(value) + 4], digits(value), { "text-anchor": "end" }),
      ]),
      text([(left + width) / 2, height - 6], "epoch"),
      text([0, 0], label, { transform: `translate(12 ${(height - bottom) / 2}) rotate(-90)` }),
      ...lines.map(({ run, i, of, y: values, dash }) => {
        const at = values.flatMap((value, k) => (value === null ? [] : [`${x(data.axes[run.axis][k])},${y(value)}`]));
        const look = { stroke: shades[i % shades.length], "stroke-dasharray": dash, "marker-start": at.length > 1 ? "" : "url(#dot)" };
        return svg("polyline", { points: at.join(" "), ...look }, svg("title", {}, `seed ${run.seed}, ${of}`));
      }),
      svg("marker", { id: "dot", markerWidth: 4, markerHeight: 4, refX: 2, refY: 2 }, svg("circle", { cx: 2, cy: 2, r: 2 })),
    );
  };
  const told = (runs) =>
    [
      `Solid: ${data.measure.images}`,
      ...(runs.some((run) => run.train?.length) ? ["dashed: training"] : []),
      ...(runs.some((run) => run.values && run.state !== "done") ? ["dotted: a run that is not done"] : []),
    ].join("; ") + ".";
  const number = (value) => (value === undefined ? "" : digits(value));
  const rowsOf = (runs) =>
    runs.map((run) => {
      const done = run.state === "done";
      const cells = [run.seed, "", done ? number(run.final) : "", done ? number(run.best) : "", number(run.seconds), ""];
      const row = make("tr", {}, ...cells.map((text) => make("td", { textContent: text })));
      row.cells[1].append(make("span", { className: `state ${run.state}`, textContent: run.state }));
      if (run.note) row.cells[1].append(` ${run.note}`);
      row.cells[5].append(run.href ? make("a", { href: run.href, textContent: run.name }) : run.name);
      return row;
    });
  const open = (index) => {
    const cell = data.cells[index];
    const runs = cell.runs.map((i) => data.runs[i]);
    const settings = { ...data.common, ...cell.own };
    const lines = (found) => Object.entries(found).map(([key, value]) => `${key}: ${value}`).sort().join("\n");
    const head = ["seed", "state", `final${unit && ` (${data.measure.unit})`}`, "best", "seconds", "record"];
    const table = make(
      "table", {},
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text, scope: "col" })))),
      make("tbody", {}, ...rowsOf(runs)),
    );
    const details = (summary, text) => make("details", {}, make("summary", { textContent: summary }), make("pre", { textContent: text, tabIndex: 0 }));
    document.getElementById("cell-title").textContent = `${cell.arm}, batch ${cell.batch}; ${cell.setting}`;
    document.getElementById("cell-body").replaceChildren(
      make("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: "Runs of this cell" }, table),
      ...(runs.some((run) => run.axis !== undefined) ? [curves(runs), make("p", { className: "caption", textContent: told(runs) })] : []),
      make("h3", { textContent: "Settings that differ within the study" }),
      make("pre", { textContent: lines(cell.own) || "none", tabIndex: 0 }),
      details("All settings", lines(settings)),
      ...runs.filter((run) => run.log).map((run) => details(`Log of seed ${run.seed} (its end)`, run.log)),
    );
    dialog.showModal();
    document.getElementById("cell-body").scrollTop = 0;
  };
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  follow();
})();
