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
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  });

  // What is folded opens for a link to it, for the button, and for paper.
  const reveal = (element) => {
    for (let each = element; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    element?.scrollIntoView();
  };
  const follow = () => {
    const target = document.getElementById(location.hash.slice(1)) || document.querySelector(":target");
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
    const text = button.nextElementSibling || button.parentElement.nextElementSibling;
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
    const rows = [...input.closest(".part").querySelectorAll("tbody tr")];
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
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
  const shades = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C510A"];
  const shadeOf = (i) => shades[i % shades.length];
  const drawn = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const digits = (value) => Number(value.toPrecision(5)).toString();
  const scale = (values, start, end) => {
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const span = high - low || Math.abs(high) || 1;
    const rough = 10 ** Math.floor(Math.log10(span / 3));
    const step = rough * [1, 2, 5, 10].find((factor) => span / (rough * factor) <= 6);
    const first = Math.ceil(low / step - 1e-9);
    const ticks = Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
    return { at: (value) => (high > low ? start + ((value - low) / span) * (end - start) : (start + end) / 2).toFixed(1), ticks };
  };
  const curves = (runs) => {
    const lines = runs.flatMap((run, i) => {
      if (run.axis === undefined) return [];
      const line = (y, dash, of) => ({ x: data.axes[run.axis], y, dash, color: shadeOf(i), name: `seed ${run.seed}, ${of}` });
      const own = line(run.values, run.state === "done" ? "none" : "1.5 3", data.measure.images);
      return run.train.length ? [own, line(run.train, "6 3", "training")] : [own];
    });
    const x = scale(lines.flatMap((line) => line.x), 52, 692);
    const y = scale(lines.flatMap((line) => line.y.filter((value) => value !== null)), 252, 10);
    const path = ({ x: places, y: values }) =>
      places.map((place, i) => {
        if (values[i] === null) return "";
        const point = `${x.at(place)} ${y.at(values[i])}`;
        const goesOn = i > 0 && values[i - 1] !== null;
        return goesOn ? `L${point}` : `M${point}h.01`; // a single point shows, too
      }).join("");
    const label = data.measure.label.replace(`${data.measure.images} `, "") + (unit && ` (${data.measure.unit})`);
    return drawn("svg", { class: "curves", viewBox: "0 0 700 290", role: "img", "aria-label": `${label} by epoch` },
      ...y.ticks.flatMap((tick) => [
        drawn("line", { x1: 52, x2: 692, y1: y.at(tick), y2: y.at(tick) }),
        drawn("text", { x: 46, y: y.at(tick), "text-anchor": "end", "dominant-baseline": "middle" }, digits(tick)),
      ]),
      ...x.ticks.filter(Number.isInteger).map((tick) => drawn("text", { x: x.at(tick), y: 268, "text-anchor": "middle" }, digits(tick))),
      drawn("text", { x: 372, y: 284, "text-anchor": "middle" }, "epoch"),
      drawn("text", { transform: "translate(12 131) rotate(-90)", "text-anchor": "middle" }, label),
      ...lines.map((line) =>
        drawn("path", { d: path(line), "stroke-dasharray": line.dash, style: `stroke: ${line.color}; stroke-width: ${line.x.length > 1 ? 1.5 : 5}; stroke-linecap: round` },
          drawn("title", {}, line.name))),
    );
  };
  const told = (runs) =>
    [
      ...(runs.length > 1 ? ["Each seed has the color beside it in the table"] : []),
      `${runs.length > 1 ? "solid" : "Solid"}: ${data.measure.images}`,
      ...(runs.some((run) => run.train?.length) ? ["dashed: training"] : []),
      ...(runs.some((run) => run.values && run.state !== "done") ? ["dotted: a run that is not done"] : []),
    ].join("; ") + ".";
  const number = (value) => (value === undefined ? "" : digits(value));
  const rowsOf = (runs) =>
    runs.map((run, i) => {
      const done = run.state === "done";
      const cells = [run.seed, "", done ? number(run.final) : "", done ? number(run.best) : "", number(run.seconds), ""];
      const row = make("tr", {}, ...cells.map((text) => make("td", { textContent: text })));
      if (run.axis !== undefined) {
        const swatch = make("span", { className: "swatch", ariaHidden: "true" }); // the curve says its seed, too
        swatch.style.borderColor = shadeOf(i);
        row.cells[0].append(swatch);
      }
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
