"use strict";
// Draws the plotly figures of a page from the data that is stored in it, light or dark as the page is.
(() => {
  const plotly = new URL("plotly.min.js", document.currentScript.src).href;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const isDark = () => {
    const theme = document.body.dataset.theme;
    return theme === "dark" || (theme !== "light" && dark.matches);
  };

  // Colours for a dark page: a grey becomes its counterpart, everything else stays.
  const counterpart = (values) => {
    const mean = values.reduce((sum, each) => sum + each / 3, 0);
    return "#" + Math.round(235 - 0.8 * mean).toString(16).padStart(2, "0").repeat(3);
  };
  const isGrey = (values) => Math.max(...values) - Math.min(...values) < 60;
  const valuesOf = (hex) => {
    const pairs = hex.length === 3 ? [...hex].map((each) => each + each) : hex.match(/../g);
    return pairs.map((pair) => parseInt(pair, 16));
  };
  const COLOUR = /(^|color:\s*)(?:#([0-9a-f]{6}|[0-9a-f]{3})\b|rgb\((\d+), ?(\d+), ?(\d+)\))/gi;
  const darkenText = (text) =>
    text.replace(/^white$/, "#fff").replace(/^black$/, "#000").replace(COLOUR, (all, before, hex, ...rgb) => {
      const values = hex ? valuesOf(hex) : rgb.slice(0, 3).map(Number);
      return before + (isGrey(values) ? counterpart(values) : all.slice(before.length));
    });
  const darken = (part, name = "") => {
    if (/colorscale|colorway/i.test(name)) return part;
    if (typeof part === "string") return darkenText(part);
    if (Array.isArray(part)) return part.map((each) => darken(each));
    if (!part || typeof part !== "object") return part;
    return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, darken(value, key)]));
  };

  const newTarget = (place) => {
    const target = Object.assign(document.createElement("div"), { className: "drawn" });
    return place.appendChild(target);
  };
  const draw = (place) => {
    const stored = JSON.parse(place.querySelector("script").textContent);
    const figure = isDark() ? darken(stored) : stored;
    const target = place.querySelector(".drawn") || newTarget(place);
    const layout = wrapTitle(figure.layout, target.clientWidth);
    const clear = "rgba(0,0,0,0)";
    const modebar = { bgcolor: clear, color: "#bbb", activecolor: "#777" };
    Object.assign(layout, { paper_bgcolor: clear, plot_bgcolor: clear, autosize: true, modebar });
    Plotly.react(target, figure.data, layout, { responsive: true, displaylogo: false });
    if (figure.frames) Plotly.addFrames(target, figure.frames);
  };

  // Pages opened as files cannot fetch other pages, so the search shows no excerpts there.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

  addEventListener("DOMContentLoaded", () => {
    const places = [...document.querySelectorAll(".plotly-figure")];
    if (!places.length) return;
    const drawAll = () => places.forEach(draw);
    const redraw = () => window.Plotly && drawAll();
    const script = Object.assign(document.createElement("script"), { src: plotly, onload: drawAll });
    document.head.appendChild(script);
    new MutationObserver(redraw).observe(document.body, { attributeFilter: ["data-theme"] });
    dark.addEventListener("change", redraw);
    addEventListener("resize", redraw);
  });
})();
