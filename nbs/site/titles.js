"use strict";
// wrapTitle(layout, width): wraps a title that is wider than its figure, which plotly would cut off, and makes
// the figure taller by the new lines. Markup inside the title has no width.
const wrapTitle = (() => {
  const pen = document.createElement("canvas").getContext("2d");
  const widthOf = (text) => pen.measureText(text.replace(/<[^>]*>/g, "")).width;

  const wrapLine = (line, width, size, family) => {
    const own = line.match(/font-size: *([0-9]+)/);
    pen.font = `${own ? own[1] : size}px ${family}`;
    const words = line.match(/(?:<[^>]*>|[^ <])+/g) || [];
    let begun = "";
    return words.reduce((before, word) => {
      const longer = `${begun || before} ${word}`;
      const fits = widthOf(longer) <= 0.94 * width;
      begun = fits ? longer : word;
      return before + (fits ? " " : "<br>") + word;
    });
  };

  return (layout, width) => {
    const { title, font = {}, margin = {} } = layout;
    if (!title || !title.text) return layout;
    const full = layout.width || Math.max(560, width);
    const left = title.xref === "paper" ? (margin.l ?? 80) : 0.05 * full;
    const { size = 1.4 * (font.size || 12), family = font.family || "sans-serif" } = title.font || {};
    const lines = title.text.split("<br>");
    title.text = lines.map((line) => (line ? wrapLine(line, full - left - 12, size, family) : "")).join("<br>");
    const more = 18 * (title.text.split("<br>").length - lines.length);
    layout.height = (layout.height || 450) + more;
    layout.margin = { ...margin, t: (margin.t ?? 100) + more };
    return layout;
  };
})();
