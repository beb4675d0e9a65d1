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
    redraw();
  });
  systemIsDark.addEventListener("change", () => redraw());

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
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (target?.classList.contains("sort")) sort(target.closest("th"));
    if (target?.classList.contains("cell")) open(Number(target.dataset.cell));
  });
  document.addEventListener("input", (event) => {
    if (event.target.classList.contains("filter")) filter(event.target);
  });

  // Figures. Plotly is read when the first one comes into view, and each figure is drawn then, too.
  const library = () => {
    if (window.Plotly) return window.Plotly;
    document.head.append(make("script", { textContent: document.getElementById("plotly").textContent }));
    return window.Plotly;
  };
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const entities = { "&": "&amp;", "<": "&lt;", $: "&#36;" }; // Plotly reads some HTML, and formulas
  const literal = (text) => String(text).replace(/[&<$]/g, (sign) => entities[sign]);
  const inTheme = (color) => {
    const hex = /^#(..)(..)(..)$/.exec(color);
    if (!isDark() || !hex) return color;
    const [red, green, blue] = hex.slice(1).map((part) => parseInt(part, 16));
    return Math.max(red, green, blue) - Math.min(red, green, blue) < 24 && red < 150 ? "#e6e9ed" : color; // black
  };
  const layoutOf = (panel) => {
    const axis = (own) => ({
      ...own,
      title: { text: literal(own.title || ""), font: { size: 12 } },
      ticktext: own.ticktext?.map((text) => literal(text).replace(/\n/g, "<br>")),
      gridcolor: variable("--line"),
      linecolor: variable("--quiet"),
      zeroline: false,
      automargin: true,
    });
    return {
      title: { text: literal(panel.title || ""), font: { size: 13 }, y: 0.98, yanchor: "top" },
      xaxis: axis(panel.x),
      yaxis: axis(panel.y),
      margin: { l: 48, r: 10, t: panel.title ? 34 : 12, b: 40 },
      font: { color: variable("--text"), size: 11, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--quiet"), activecolor: variable("--link") },
      hovermode: "closest",
      hoverlabel: { bgcolor: variable("--raised"), bordercolor: variable("--line"), font: { color: variable("--text") } },
    };
  };
  const digits = (value) =>
    value === null ? "" : (Number.isInteger(value) ? value : Number(value.toPrecision(5))).toString();
  const traceOf = (trace, hidden) => {
    const { half, text, ...rest } = trace;
    const told = (x, y, i) => {
      const sign = half?.[i] ? ` ± ${digits(half[i])}` : "";
      const across = trace.error_x ? `${digits(x)}${sign}` : digits(y) + sign;
      return text ? `${literal(text[i])}: ${across}` : `${digits(x)}: ${across}`;
    };
    const name = trace.name ? `<b>${literal(trace.name)}</b><br>` : "";
    return {
      ...rest,
      type: "scatter",
      name: literal(trace.name || ""),
      visible: !hidden.has(trace.legendgroup),
      line: { ...trace.line, ...(trace.line.color && { color: inTheme(trace.line.color) }) },
      ...(trace.marker && { marker: { ...trace.marker, color: inTheme(trace.marker.color) } }),
      ...(trace.error_y && { error_y: { ...trace.error_y, color: inTheme(trace.error_y.color) } }),
      ...(trace.error_x && { error_x: { ...trace.error_x, color: inTheme(trace.error_x.color) } }),
      ...(trace.hoverinfo !== "skip" && {
        hovertext: trace.x.map((x, i) => name + told(x, trace.y[i], i)),
        hoverinfo: "text",
      }),
    };
  };
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]; // none that would need a network
  const options = { displaylogo: false, responsive: true, modeBarButtons: buttons };
  const plot = (element, panel, hidden) =>
    library().react(element, panel.traces.map((trace) => traceOf(trace, hidden)), layoutOf(panel), options);

  const drawn = new Map(); // figure -> what draws it again
  const draw = (figure) => {
    const { panels, legend } = data.figures[Number(figure.dataset.figure)];
    const hidden = new Set();
    const boxes = panels.map(() => make("div", { className: "panel" }));
    const holder = figure.querySelector(".panels");
    holder.classList.toggle("one", panels.length === 1);
    holder.replaceChildren(...boxes);
    const again = () => panels.forEach((panel, i) => plot(boxes[i], panel, hidden));
    const grouped = new Set(panels.flatMap((panel) => panel.traces.map((trace) => trace.legendgroup)));
    const key = () =>
      figure.querySelector(".legend").replaceChildren(
        ...[...legend].sort((a, b) => grouped.has(b.name) - grouped.has(a.name)).map(({ name, color, dash }) => {
          const line = make("i", { className: dash });
          line.style.color = inTheme(color);
          if (!grouped.has(name)) return make("button", { type: "button", disabled: true }, line, name);
          const button = make("button", { type: "button", title: "Hide or show" }, line, name);
          button.setAttribute("aria-pressed", String(!hidden.has(name)));
          button.addEventListener("click", () => {
            if (!hidden.delete(name)) hidden.add(name);
            button.setAttribute("aria-pressed", String(!hidden.has(name)));
            again();
          });
          return button;
        }),
      );
    key();
    again();
    drawn.set(figure, () => (key(), again()));
  };
  const redraw = () => drawn.forEach((again) => again());
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((found) => found.isIntersecting)) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "400px" },
  );
  document.querySelectorAll("figure[data-figure]").forEach((figure) => watcher.observe(figure));

  // Paper shows what was found, not only the verdict.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.verdict:not([open])")];
    for (const verdict of opened) verdict.open = true;
  });
  addEventListener("afterprint", () => {
    for (const verdict of opened) verdict.open = false;
  });

  // A cell: the runs behind it.
  const dialog = document.getElementById("cell");
  const shades = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C510A"];
  const curves = (runs) => ({
    title: "",
    x: { title: "epoch" },
    y: { title: data.measure.label.replace(`${data.measure.images} `, "") + (unit && ` (${data.measure.unit})`) },
    traces: runs.flatMap((run, i) => {
      const line = (y, dash, of) => ({
        x: data.axes[run.axis],
        y,
        mode: data.axes[run.axis].length > 1 ? "lines" : "markers",
        name: `seed ${run.seed}, ${of}`,
        line: { color: shades[i % shades.length], dash, width: 1.5 },
        marker: { color: shades[i % shades.length] },
      });
      if (run.axis === undefined) return [];
      return [
        line(run.values, run.state === "done" ? "solid" : "dot", data.measure.images),
        ...(run.train.length ? [line(run.train, "dash", "training")] : []),
      ];
    }),
  });
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
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text })))),
      make("tbody", {}, ...rowsOf(runs)),
    );
    const chart = make("div", { className: "panel" });
    const details = (summary, text) => make("details", {}, make("summary", { textContent: summary }), make("pre", { textContent: text }));
    document.getElementById("cell-title").textContent = `${cell.arm}, batch ${cell.batch}; ${cell.setting}`;
    document.getElementById("cell-body").replaceChildren(
      make("div", { className: "scroll" }, table),
      ...(runs.some((run) => run.axis !== undefined) ? [chart, make("p", { className: "caption", textContent: told(runs) })] : []),
      make("h4", { textContent: "Settings that differ within the study" }),
      make("pre", { textContent: lines(cell.own) || "none" }),
      details("All settings", lines(settings)),
      ...runs.filter((run) => run.log).map((run) => details(`Log of seed ${run.seed} (its end)`, run.log)),
    );
    dialog.showModal();
    if (chart.isConnected) plot(chart, curves(runs), new Set());
    document.getElementById("cell-body").scrollTop = 0;
  };
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
})();
