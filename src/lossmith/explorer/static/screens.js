"use strict";
// One function a screen: numbers and texts of the server -> what is seen.

const ABOUT = {
  loss: "What each loss says. Lines and values that are not as in the first loss are marked.",
  weight: "How strongly one token is pushed, w(r, A) = −(dℓ/dlogp)/A, as its probability moves by the ratio r. Shaded: no gradient at all.",
  group: "Completions of one prompt, from rewards to what each token is told. Numbers at tokens are −dL/dlogp: above 0, a step makes the token more likely.",
  truth: "A policy with seven possible completions, so that expectations are exact sums. Each loss takes gradient steps from the same start.",
};

function mathOf(text) {
  const read = new DOMParser().parseFromString(text, "application/xml");
  return document.importNode(read.documentElement, true);
}

function copied(text, what) {
  const button = el("button", { type: "button", "aria-label": `Copy ${what}`, class: "only-live" }, "Copy");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); tell(`Copied ${what}.`); button.textContent = "Copied"; }
    catch { tell("The browser would not copy; select the text instead."); }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

function keys(view) {
  const good = view.losses.filter((one) => !one.error);
  return el("div", { class: "keys" }, ...good.map((one) => el("span", { class: `key k${one.k}` }, el("i"), one.call)));
}

const drawn = {
  loss(view, data) {
    const good = view.losses.filter((one) => !one.error);
    const sheets = data.losses.map((one, i) => el("section", { class: `sheet mine k${good[i].k}` },
      el("h2", {}, one.name),
      el("p", { class: "hint" }, one.summary, el("br"), [one.source, one.preset_of && `a preset of ${one.preset_of}`].filter(Boolean).join("; ")),
      el("div", { class: "formula", tabindex: "0", role: "group", "aria-label": `Formula of ${one.name}` }, ...one.text.map((line, j) =>
        el("div", { class: line.differs ? "differs" : "", title: line.differs ? "not as in the first loss" : null },
          one.mathml.length ? mathOf(one.mathml[j]) : el("span", { class: "text" }, line.line)))),
      ...one.traps.map((trap) => el("p", { class: "notice trap" }, el("b", {}, "trap "), trap)),
      el("p", { class: "hint" }, `Couples rows by ${one.couples}; needs log-probabilities, mask${one.needs.map((n) => `, ${n.name}`).join("")}.`),
      el("div", { class: "copy" }, el("pre", { tabindex: "0" }, one.recipe), copied(one.recipe, "the line of a recipe")),
      el("details", { class: "plain" }, el("summary", {}, "In plain torch"),
        el("div", { class: "copy" }, el("pre", { tabindex: "0" }, one.code), copied(one.code, "the listing")))));
    if (!data.differences) return sheets;
    const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "parameter"), ...data.names.map((n) => el("th", {}, n)))),
      el("tbody", {}, ...data.differences.map((d) => el("tr", {}, el("th", { scope: "row" }, d.name, el("small", {}, d.meaning)),
        ...d.values.map((v) => el("td", { class: v.differs ? "differs" : "" }, v.differs ? "≠ " : "", v.text, v.words ? el("small", {}, v.words) : ""))))));
    return [...sheets, el("section", { class: "sheet" }, el("h2", {}, "What differs"), ...data.same.map((s) => el("p", {}, s)),
      data.differences.length ? el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "What differs" }, table) : el("p", {}, "Nothing."))];
  },

  weight(view, data) {
    const good = view.losses.filter((one) => !one.error);
    const both = [0, 1].map((side) => chart({
      label: side ? "A < 0: the completion was worse than expected" : "A > 0: the completion was better than expected",
      x: data.ratios, xTexts: data.ratio_texts, xName: "r (ratio, log scale)", log: true, xTicks: [0.1, 0.2, 0.5, 1, 2, 5, 10],
      low: data.bottom, high: data.top, mark: 1,
      series: data.curves.map((c, i) => ({ ...c, k: good[i].k, name: good[i].call })).filter((c) => c.sides.length)
        .map((c) => ({ k: c.k, name: c.name, y: c.sides[side].y, texts: c.sides[side].texts, stopped: c.sides[side].stopped })),
    }));
    const refused = data.curves.map((c, i) => c.error && el("p", { class: "notice" }, `${good[i].call}: ${c.error}`)).filter(Boolean);
    const rows = data.curves.flatMap((c, i) => c.sides.map((side) => el("tr", {},
      el("th", { scope: "row" }, el("span", { class: `key k${good[i].k}` }, el("i"), good[i].call)), el("td", {}, side.label),
      ...side.row.map((w) => el("td", { class: "n" }, w)),
      el("td", {}, side.stopped.map((s) => s.text).join("; ") || "nowhere"))));
    const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "w(r, A)"), el("th", {}, ""),
      ...data.columns.map((r) => el("th", { class: "n" }, `r = ${r}`)), el("th", {}, "no gradient at r"))), el("tbody", {}, ...rows));
    return [keys(view), ...refused, el("div", { class: "charts" }, ...both),
      rows.length ? el("section", { class: "sheet" }, el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table of weights" }, table)) : ""];
  },

  group(view, data) {
    const good = view.losses.filter((one) => !one.error);
    return data.losses.map((one, i) => {
      const head = [el("h2", {}, good[i].call)];
      if (one.error) return el("section", { class: `sheet mine k${good[i].k}` }, ...head, el("p", { class: "notice" }, one.error));
      const columns = one.columns.map((c) => el("th", { class: "n" }, c.name, el("small", {}, c.words)));
      const rows = one.rows.map((row, j) => el("tr", {},
        el("th", { scope: "row" }, String(j + 1), data.cut[j] ? el("small", {}, "cut off") : ""), el("td", { class: "n" }, data.rewards[j]),
        ...row.credit.map((text) => el("td", { class: "n" }, text)),
        el("td", {}, el("div", { class: "tokens" }, ...row.tokens.map((t) => token(t)))),
        el("td", { class: "n" }, row.total, el("small", {}, row.pushed))));
      const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "completion"), el("th", { class: "n" }, "reward"), ...columns,
        el("th", {}, "each token is pushed by"), el("th", { class: "n" }, "together"))), el("tbody", {}, ...rows));
      const pulls = one.pulls.map((pull) => el("details", { class: "plain" }, el("summary", {}, `How the term “${pull.name}” comes about`),
        el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Factors of ${pull.name}` }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "completion"),
          ...pull.factors.map((f) => el("th", { class: "n" }, f.name, el("small", {}, f.words))), el("th", { class: "n" }, "product, of each token"))),
        el("tbody", {}, ...pull.rows.map((text, j) => el("tr", {}, el("th", { scope: "row" }, String(j + 1)),
          ...pull.factors.map((f) => el("td", { class: "n" }, f.rows[j])), el("td", { class: "n" }, text))))))));
      return el("section", { class: `sheet mine k${good[i].k}` }, ...head, el("p", { class: "hint" }, `The loss is ${one.value}. Its value says little: its slopes, below, are what trains.`),
        one.note ? el("p", { class: "notice" }, one.note) : "",
        el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "The group" }, table), ...pulls);
    });
  },

  truth(view, data) {
    const good = view.losses.filter((one) => !one.error);
    const words = Object.fromEntries(data.measures.map((m) => [m.name, m.words]));
    const erring = data.completions.some((c) => c.reward !== c.gold);
    const measures = Object.keys(words).filter((name) => name !== "gold" || erring);
    const graphs = measures.map((name) => {
      const all = data.walks.flatMap((w) => w.points.map((p) => p[name])).filter((v) => v !== null);
      let low = Math.min(...all, name === "cosine" ? 0 : Infinity), high = Math.max(...all, name === "cosine" ? 1 : -Infinity);
      if (!all.length) [low, high] = [0, 1];
      const room = (high - low) * 0.06 || 0.1;
      const x = Array.from({ length: data.steps + 1 }, (_, i) => i);
      return chart({ label: words[name], x, xTexts: x.map(String), xName: "step", low: low - room, high: high + room,
        series: data.walks.map((w, i) => ({ k: good[i].k, name: good[i].call, y: w.points.map((p) => p[name]), texts: w.texts.map((t) => t[name]) })) });
    });
    const refused = data.walks.map((w, i) => w.error && el("p", { class: "notice" }, `${good[i].call}: ${w.error}`)).filter(Boolean);
    const bar = (share, k) => el("div", { class: k === null ? "" : `k${k}` }, sized(el("i"), share.p), share.text);
    const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "completion"), el("th", { class: "n" }, "reward"),
      ...(erring ? [el("th", { class: "n" }, "true reward")] : []), el("th", {}, "reference"), el("th", {}, "at the start"),
      ...good.map((one) => el("th", {}, `after ${data.steps} steps of ${one.call}`)))),
    el("tbody", {}, ...data.completions.map((c) => el("tr", {}, el("th", { scope: "row" }, c.text), el("td", { class: "n" }, c.reward),
      ...(erring ? [el("td", { class: "n" }, c.gold)] : []), ...[c.ref, c.start].map((s) => el("td", {}, el("div", { class: "bars" }, bar(s, null)))),
      ...c.now.map((s, i) => el("td", {}, el("div", { class: "bars" }, bar(s, good[i].k))))))));
    return [keys(view), ...refused, data.done ? "" : el("p", { class: "hint" }, "Computing …"), el("div", { class: "charts" }, ...graphs),
      el("section", { class: "sheet" }, el("h2", {}, "How likely each completion is"), el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Distribution" }, table))];
  },
};

function token(t) {
  const made = el("span", { class: "token" }, t.text);
  made.style.setProperty("--hue", t.size > 0 ? "var(--up)" : "var(--down)");
  made.style.setProperty("--share", `${Math.round(Math.abs(t.size) * 38)}%`);
  return made;
}

function sized(bar, p) {
  bar.style.width = `${(p * 6).toFixed(2)}rem`;
  return bar;
}
