"use strict";
// A page whose study is watched shows each new state by itself: it loads its own file again now and then, as no browser
// lets a page from a file read others, and is as its reader left it. A page without the mark of `live.py` does neither.
(() => {
  const LEAST = 5_000; // milliseconds between two loads; longer while nothing changes, at most
  const MOST = 60_000;
  const IDLE = 2_500; // since the reader last did something
  const made = document.documentElement.dataset.live;
  const key = `normlab ${location.pathname}`;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const store = (read) => {
    try {
      return read(sessionStorage);
    } catch {
      return null; // a browser may refuse it to a file
    }
  };
  const isReload = performance.getEntriesByType("navigation")[0]?.type === "reload";
  const before = (isReload && store((storage) => JSON.parse(storage.getItem(key)))) || null;
  store((storage) => storage.removeItem(key));
  if (!made && !before) return;

  // Where an element is, in words that hold when the page has more rows, verdicts and arms, and other numbers.
  const letters = (text) => text.replace(/[^\p{L}]+/gu, "");
  const label = (element) => {
    const cell = element.closest("td");
    if (cell) return `${cell.parentElement.cells[0].textContent.trim()} ${cell.cellIndex}`;
    const named = (element.localName === "details" && element.querySelector("summary")) || element;
    return letters(named.getAttribute("aria-label") || named.textContent);
  };
  const peers = (id, tag) =>
    all(tag, (id && document.getElementById(id)) || document).filter((each) => !each.id);
  const placeOf = (element) => {
    if (element.id) return { id: element.id };
    const [id, tag, name] = [element.closest("[id]")?.id, element.localName, label(element)];
    const found = peers(id, tag);
    const nth = found.filter((each) => label(each) === name).indexOf(element);
    return { id, tag, name, nth, at: found.indexOf(element), of: found.length };
  };
  const find = ({ id, tag, name, nth, at, of }) => {
    if (!tag) return document.getElementById(id);
    const found = peers(id, tag);
    return found.filter((each) => label(each) === name)[nth] || (found.length === of ? found[at] : undefined);
  };

  // What a reader changes: by selector, how it is read and how it is set.
  const press = (element, name, value) => {
    const button = element.querySelector("button") || element;
    for (let i = 0; i < 2 && element.getAttribute(name) !== value; i += 1) button.click();
  };
  const attribute = (name) => [(element) => element.getAttribute(name), (element, value) => press(element, name, value)];
  const KINDS = {
    details: [(element) => element.open, (element, value) => (element.open = value)],
    "[aria-pressed]": attribute("aria-pressed"),
    "[aria-checked]": attribute("aria-checked"),
    "th[aria-sort]": attribute("aria-sort"),
    "input[type=search]": [
      (element) => element.value,
      (element, value) => {
        element.value = value;
        element.dispatchEvent(new Event("input", { bubbles: true }));
      },
    ],
    ".scroll": [(element) => element.scrollLeft, (element, value) => (element.scrollLeft = value)],
  };
  const asMade = new Map(all("details").map((element) => [element, element.open]));
  const kept = () =>
    Object.entries(KINDS).flatMap(([kind, [read]]) =>
      all(kind)
        .filter((element) => !element.closest("dialog") && element.offsetParent !== null)
        .map((element) => ({ kind, element, value: read(element) }))
        .filter(({ element, value }) => (asMade.has(element) ? asMade.get(element) !== value : value))
        .map(({ kind, element, value }) => ({ kind, value, place: placeOf(element) })),
    );
  const anchor = () => {
    const top = all("main [id], main summary, main tr, main h2, main h3").findLast((element) => {
      const box = element.getBoundingClientRect();
      return box.height && box.top <= 60;
    });
    return scrollY && top ? { place: placeOf(top), offset: top.getBoundingClientRect().top } : null;
  };
  let paused = before?.paused || false;
  const save = () => {
    const focused = document.activeElement;
    const state = {
      ...{ made, paused, kept: kept(), anchor: anchor(), theme: document.documentElement.dataset.theme },
      ...(focused !== document.body && { focus: placeOf(focused), caret: focused.selectionStart }),
      quiet: before?.made === made ? before.quiet + 1 : 0, // loads that brought nothing new
    };
    store((storage) => storage.setItem(key, JSON.stringify(state)));
    history.scrollRestoration = "manual";
  };

  const restore = () => {
    if (before.theme && before.theme !== document.documentElement.dataset.theme) document.documentElement.dataset.theme = before.theme;
    let missing = before.kept;
    const again = () => {
      missing = missing.filter(({ kind, value, place }) => {
        const element = find(place);
        if (element?.matches(kind)) KINDS[kind][1](element, value);
        return !element;
      });
    };
    again();
    const drawn = new MutationObserver(again); // of figures that are drawn when they come into view
    if (missing.length) drawn.observe(document.body, { childList: true, subtree: true });
    const focused = before.focus && find(before.focus);
    focused?.focus({ preventScroll: true });
    if (before.caret != null) focused?.setSelectionRange?.(before.caret, before.caret);
    const scroll = () => {
      const top = before.anchor && find(before.anchor.place);
      if (top) scrollBy({ top: top.getBoundingClientRect().top - before.anchor.offset, behavior: "instant" });
    };
    scroll();
    addEventListener("load", () => requestAnimationFrame(() => (scroll(), made || (history.scrollRestoration = "auto"))));
  };
  if (before) restore();

  // The line that says so, and whether it is the reader who has the say.
  const line = document.createElement("p");
  const news = document.createElement("span");
  news.setAttribute("role", "status");
  line.className = "live caption";
  document.querySelector("main").before(line);
  if (!made) {
    line.append(news);
    setTimeout(() => (news.textContent = "Not watched any more: this page stays as it is."), 500);
    return;
  }
  const time = document.createElement("time");
  time.dateTime = made;
  time.textContent = new Date(made).toLocaleString();
  const button = document.createElement("button");
  Object.assign(button, { type: "button", id: "live-pause" });
  const told = () => (button.textContent = paused ? "Resume updates" : "Pause updates");
  button.addEventListener("click", () => {
    paused = !paused;
    told();
  });
  told();
  line.append("Live: as of ", time, ", and it shows a new state by itself. ", button, " ", news);
  if (before?.focus?.id === button.id) button.focus({ preventScroll: true });
  if (before && before.made !== made) setTimeout(() => (news.textContent = "Updated."), 500);

  let touched = 0;
  let held = false;
  let printing = false;
  const touch = () => (touched = Date.now());
  for (const type of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove", "scroll", "input"]) {
    addEventListener(type, touch, { capture: true, passive: true });
  }
  addEventListener("pointerdown", () => (held = true), true);
  for (const type of ["pointerup", "pointercancel"]) addEventListener(type, () => (held = false), true);
  addEventListener("beforeprint", () => (printing = true));
  addEventListener("afterprint", () => (printing = false));
  const seen = (element) => element.checkVisibility?.({ opacityProperty: true, visibilityProperty: true }) ?? true;
  const isBusy = () =>
    held ||
    printing ||
    Date.now() - touched < IDLE ||
    !getSelection().isCollapsed ||
    document.querySelector("dialog[open], :popover-open") ||
    all("[role=tooltip], .hovertext").some(seen);
  addEventListener("load", () => {
    const quiet = before?.made === made ? before.quiet + 1 : 0;
    const wait = Math.max(Math.min(MOST, LEAST * 1.5 ** quiet), 20 * performance.now());
    const due = Date.now() + wait;
    setInterval(() => {
      if (!paused && !document.hidden && Date.now() >= due && !isBusy()) location.reload();
    }, 500);
  });
  addEventListener("pagehide", save);
})();
