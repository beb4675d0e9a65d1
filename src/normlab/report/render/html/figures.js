"use strict";
// Figures: the mark nearest to the pointer, or in focus, shows its values, and a click opens its runs (of touches the
// second one); a key of the legend hides its series; the tab key stops once at the keys and once at the marks of a
// figure; from there left and right go on along a series, up and down to the same place of another one.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.ariaHidden = "true"; // its text is the label of the mark
  document.body.append(tip);
  let shown = null;
  const show = (mark) => {
    if (mark === shown) return;
    shown?.classList.remove("near");
    mark?.classList.add("near");
    shown = mark;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    const at = mark.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
    const below = at.bottom + tip.offsetHeight + 8 < innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left + (at.width - tip.offsetWidth) / 2, room)) + scrollX}px`;
    tip.style.top = `${(below ? at.bottom + 4 : at.top - tip.offsetHeight - 4) + scrollY}px`;
  };
  const nearest = (event) => {
    const svg = event.target.closest?.(".plot svg");
    if (!svg) return null;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const distance = (mark) => Math.hypot(mark.getAttribute("cx") - at.x, mark.getAttribute("cy") - at.y);
    const found = [...svg.querySelectorAll(".mark:not(.off)")].map((mark) => [distance(mark), mark]);
    const [least, mark] = found.reduce((a, b) => (b[0] < a[0] ? b : a), [8, null]);
    return least < 8 ? mark : null;
  };
  const toggle = (key) => {
    const svg = key.closest("svg");
    const { series } = key.dataset;
    const hides = key.getAttribute("aria-pressed") === "true";
    for (const each of svg.querySelectorAll(`[data-series="${series}"]`)) each.setAttribute("aria-pressed", String(!hides));
    for (const each of svg.querySelectorAll(`.s${series}, .k${series}`)) each.classList.toggle("off", hides);
    svg.querySelector('.mark[tabindex="0"]')?.setAttribute("tabindex", "-1");
    svg.querySelector(".mark:not(.off)")?.setAttribute("tabindex", "0");
  };
  const peers = (element) => [...element.parentNode.children].filter((each) => !each.classList.contains("off"));
  const along = (element, steps) => {
    const all = peers(element);
    return all[Math.min(all.length - 1, Math.max(0, all.indexOf(element) + steps))];
  };
  const across = (element, step) => {
    const seriesOf = (each) => each?.getAttribute("class").match(/\bs\d+/)?.[0];
    const all = peers(element);
    const own = seriesOf(element);
    if (all.every((each) => seriesOf(each) === own)) return along(element, step); // a legend, or a single series
    const others = step > 0 ? all.slice(all.indexOf(element)) : all.slice(0, all.indexOf(element)).reverse();
    const first = others.findIndex((each) => seriesOf(each) !== own);
    if (first < 0) return element;
    const after = others.slice(first);
    const end = after.findIndex((each) => seriesOf(each) !== seriesOf(after[0]));
    const away = (mark) => Math.abs(mark.getAttribute("cx") - element.getAttribute("cx"));
    return after.slice(0, end < 0 ? after.length : end).reduce((a, b) => (away(b) < away(a) ? b : a));
  };
  const go = (element, next) => {
    element.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  };
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  const series = { ArrowDown: 1, ArrowUp: -1 };
  const press = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  document.addEventListener("pointermove", (event) => event.pointerType !== "touch" && show(nearest(event)));
  document.addEventListener("focusin", (event) => show(event.target.closest(".plot .mark")));
  document.addEventListener("click", (event) => {
    const key = event.target.closest(".plot .key");
    if (key) toggle(key);
    if (event.target.closest(".plot .mark")) return; // pressed by a key, or by what reads the screen
    const mark = nearest(event);
    if (event.pointerType === "touch" && mark !== shown) show(mark);
    else if (mark) press(mark);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
    const element = event.target.closest?.(".plot .mark, .plot .key");
    if (!element) return;
    if (event.key in steps) go(element, along(element, steps[event.key]));
    else if (event.key in series) go(element, across(element, series[event.key]));
    else if (event.key === "Enter" || event.key === " ") press(element);
    else return;
    event.preventDefault();
  });
})();
