"use strict";
(() => {
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const quote = (text) => (/[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);

  // A spreadsheet must not take a document's name for a formula.
  const safe = (text) => (/^[=+\-@\t]/.test(text) && Number.isNaN(Number(text)) ? "'" + text : text);

  const value = (cell) => (cell.dataset.v ?? cell.textContent.trim().replace(/\s+/g, " "));

  const csv = (table) => {
    const spans = all(table.tHead, ".spans td").flatMap((cell) => Array(cell.colSpan).fill(cell.textContent.trim()));
    const heads = all(table.tHead.rows[table.tHead.rows.length - 1], "th");
    const rows = Array.from(table.tBodies[0].rows);
    const wide = heads.map((_, index) => rows.some((row) => row.cells[index].dataset.low !== undefined));
    const names = heads.flatMap((head, index) => {
      const own = (head.querySelector("button") ?? head).firstChild.textContent.trim();
      const name = spans[index] ? spans[index] + ": " + own : own;
      return wide[index] ? [name, name + " low", name + " high"] : [name];
    });
    const lines = rows.map((row) =>
      Array.from(row.cells).flatMap((cell, index) =>
        wide[index] ? [value(cell), cell.dataset.low ?? "", cell.dataset.high ?? ""] : [value(cell)],
      ),
    );
    return [names, ...lines].map((line) => line.map((text) => quote(safe(text))).join(",")).join("\r\n") + "\r\n";
  };

  const sortable = (table) => {
    const heads = all(table.tHead, "th");
    heads.forEach((head, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const compare = (left, right) => {
          const [a, b] = [left, right].map((row) => row.cells[index].dataset.v);
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
          const order = Number.isNaN(Number(a - b)) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
          return down ? -order : order;
        };
        const body = table.tBodies[0];
        body.append(...Array.from(body.rows).sort(compare));
        limit(table);
      });
    });
  };

  // Shows the rows that pass the filter, the first 50 of them unless all were asked for.
  const limit = (table) => {
    const box = table.closest(".table");
    const button = box.querySelector("button.all");
    const wanted = (box.querySelector("input")?.value ?? "").trim().toLowerCase();
    const shown = button && !wanted ? Number(box.dataset.shown) : Infinity;
    let count = 0;
    for (const row of table.tBodies[0].rows) {
      const texts = all(row, "th, td.w").map((cell) => cell.textContent.toLowerCase());
      const passes = texts.some((text) => text.includes(wanted));
      count += passes;
      row.classList.toggle("more", !passes || count > shown);
    }
    if (button) button.hidden = shown === Infinity;
  };

  for (const box of all(document, ".table")) {
    const table = box.querySelector("table");
    const download = box.querySelector("button.csv");
    download.hidden = false;
    download.addEventListener("click", () => save(box.dataset.name + ".csv", "text/csv", csv(table)));
    if (table.classList.contains("sortable")) sortable(table);
    const more = box.querySelector("button.all");
    if (more) {
      box.dataset.shown = all(table, "tbody tr:not(.more)").length;
      more.hidden = false;
      more.addEventListener("click", () => {
        box.dataset.shown = Infinity;
        limit(table);
      });
    }
    const filter = box.querySelector(".filter");
    if (filter) {
      filter.hidden = false;
      filter.querySelector("input").addEventListener("input", () => limit(table));
    }
  }

  for (const button of all(document, "button.json")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const data = JSON.parse(document.getElementById(button.dataset.from).textContent);
      save(button.dataset.name, "application/json", JSON.stringify(data, null, 2) + "\n");
    });
  }

  // A click on a picture shows it large, beside the training picture of its prompt.
  const zoom = (table, image) => {
    const dialog = document.createElement("dialog");
    dialog.className = "zoom";
    const both = document.createElement("div");
    both.className = "both";
    for (const one of new Set([image, table.querySelector(".training img")])) {
      if (!one) continue;
      const figure = document.createElement("figure");
      const large = document.createElement("img");
      const words = document.createElement("figcaption");
      large.src = one.src;
      large.alt = words.textContent = one.alt;
      large.className = one.naturalWidth < 256 ? "small" : "";
      figure.append(large, words);
      both.append(figure);
    }
    dialog.append(both);
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  };

  for (const table of all(document, ".gallery")) {
    table.addEventListener("click", (event) => {
      if (event.target instanceof HTMLImageElement) zoom(table, event.target);
    });
  }

  addEventListener("beforeprint", () => all(document, "details").forEach((one) => (one.open = true)));
  document.documentElement.classList.add("scripted");
})();
