"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, attributes = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), attributes);
    element.append(...children);
    return element;
  };
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (systemIsDark.matches ? "dark" : "light")) === "dark";
  document.addEventListener("theme", () => redraw());

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
    const { panels, legend } = data.figures[figure.dataset.figure];
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
})();
