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
  const label = (element) => {
    const cell = element.closest("tbody td, tbody th");
    const heading = cell?.closest("table").tHead?.rows[0].cells[cell.cellIndex];
    if (heading) return `${cell.parentElement.cells[0].textContent.trim()} ${heading.textContent}`;
    const named = (element.localName === "details" && element.querySelector("summary")) || element;
    return (named.getAttribute("aria-label") || named.textContent).trim();
  };
  const NAMES = [label, (element) => label(element).replace(/[^\p{L}]+/gu, "")];
  const peers = (id, kind) => all(kind, (id && document.getElementById(id)) || document).filter((each) => !each.id);
  const placeOf = (element, kind = element.localName) => {
    if (element.id) return { id: element.id };
    const id = element.closest("[id]")?.id;
    const found = peers(id, kind);
    const names = NAMES.map((name) => [name(element), found.filter((each) => name(each) === name(element)).indexOf(element)]);
    return { id, kind, names, at: found.indexOf(element), of: found.length };
  };
  const find = ({ id, kind, names, at, of }) => {
    if (!kind) return document.getElementById(id);
    const found = peers(id, kind);
    const named = names.map(([text, nth], i) => found.filter((each) => NAMES[i](each) === text)[nth]);
    return named.find(Boolean) || (found.length === of ? found[at] : undefined);
  };

  // What a reader changes: by selector, how it is read and how it is set.
  const attribute = (name) => [
    (element) => element.getAttribute(name) || "",
    (element, value) => {
      const button = element.querySelector("button") || element;
      const isOther = () => element.getAttribute(name) !== value;
      for (let i = 0; i < 2 && isOther(); i += 1) button.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    },
  ];
  const KINDS = {
    details: [(element) => element.open, (element, value) => (element.open = value)],
    "[aria-pressed]": attribute("aria-pressed"),
    "thead th": attribute("aria-sort"),
    "input[type=search]": [
      (element) => element.value,
      (element, value) => {
        element.value = value;
        element.dispatchEvent(new Event("input", { bubbles: true }));
      },
    ],
    ".scroll": [
      ({ scrollLeft, scrollTop }) => (scrollLeft || scrollTop ? [scrollLeft, scrollTop] : ""),
      (element, [left, top]) => element.scrollTo({ left, top, behavior: "instant" }),
    ],
  };
  const asMade = new Map(all("[aria-pressed]").map((key) => [key, key.getAttribute("aria-pressed")]));
  const changed = () =>
    Object.entries(KINDS).flatMap(([kind, [read]]) =>
      all(kind, document.querySelector("main"))
        .map((element) => ({ element, value: read(element) }))
        .filter(({ element, value }) => value !== (asMade.get(element) ?? ""))
        .map(({ element, value }) => ({ kind, value, place: placeOf(element, kind) })),
    );
  const top = () => {
    const isThere = (element) => element.getClientRects().length && element.getBoundingClientRect().top <= 60;
    const found = scrollY && all("main [id], main summary, main tr, main h2, main h3").findLast(isThere);
    return found ? { place: placeOf(found), offset: found.getBoundingClientRect().top } : null;
  };
  const { dataset } = document.documentElement;
  let paused = before?.paused || false;
  const loads = before?.made === made ? before.loads + 1 : 0; // that brought nothing new
  const save = () => {
    const focused = document.activeElement;
    const focus = focused === document.body ? null : { place: placeOf(focused), caret: focused.selectionStart ?? null };
    const state = { made, paused, loads, changed: changed(), top: top(), scroll: scrollY, focus, theme: dataset.theme };
    if (store((storage) => storage.setItem(key, JSON.stringify(state))) !== null) history.scrollRestoration = "manual";
  };
  const restore = () => {
    document.querySelector("dialog[open]")?.close(); // of a link that was followed before
    if (before.theme) dataset.theme = before.theme;
    for (const { kind, value, place } of before.changed) {
      const element = find(place);
      if (element) KINDS[kind][1](element, value);
    }
    const focused = before.focus && find(before.focus.place);
    focused?.focus({ preventScroll: true });
    if (before.focus?.caret != null) focused?.setSelectionRange?.(before.focus.caret, before.focus.caret);
    const scroll = () => {
      const found = before.top && find(before.top.place);
      const by = found ? found.getBoundingClientRect().top - before.top.offset : before.scroll - scrollY;
      scrollBy({ top: by, behavior: "instant" });
    };
    scroll();
    addEventListener("load", () => requestAnimationFrame(scroll));
  };
  if (before) restore();

  // The line that says so, and whether it is the reader who has the say.
  const line = document.createElement("p");
  const news = document.createElement("span");
  news.setAttribute("role", "status");
  line.className = "live caption";
  document.querySelector("main").prepend(line);
  if (!made) {
    line.append(news);
    history.scrollRestoration = "auto";
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
  if (before?.focus?.place.id === button.id) button.focus({ preventScroll: true });
  if (before && before.made !== made) setTimeout(() => (news.textContent = "Updated."), 500);

  let touched = 0;
  let held = false;
  let printing = false;
  const touch = () => (touched = Date.now());
  for (const type of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove", "scroll", "input"]) {
    addEventListener(type, touch, { capture: true, passive: true });
  }
  addEventListener("pointerdown", (event) => (held = event.button === 0), true);
  for (const type of ["pointerup", "pointercancel"]) addEventListener(type, () => (held = false), true);
  addEventListener("beforeprint", () => (button.hidden = printing = true));
  addEventListener("afterprint", () => (button.hidden = printing = false));
  const isBusy = () =>
    held ||
    printing ||
    Date.now() - touched < IDLE ||
    !getSelection().isCollapsed ||
    document.querySelector("dialog[open], .tip:not([hidden])");
  addEventListener("load", () => {
    const wait = Math.max(Math.min(MOST, LEAST * 1.5 ** loads), 20 * performance.now());
    let due = Date.now() + wait;
    setInterval(() => {
      if (paused || document.hidden || Date.now() < due || isBusy()) return;
      due = Infinity; // once
      location.reload();
    }, 500);
  });
  addEventListener("pagehide", save);
})();
