(() => {
  'use strict';
  const data = JSON.parse(document.getElementById('data').textContent);
  const $ = (selector) => document.querySelector(selector);
  const NS = 'http://www.w3.org/2000/svg';
  const svg = (name, attributes, parent) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  };
  const element = (name, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  };
  const color = (label) => `hsl(${Math.floor(label * 360 * 0.618034) % 360} 90% 60%)`;
  const className = (label) => data.classes[label] ?? `class ${label}`;

  $('#theme').onclick = () => {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme.includes('dark');
    root.dataset.theme = dark ? 'light' : 'dark';
  };

  const drawBox = (parent, box, stroke, text, unit, dashed) => {
    const [x1, y1, x2, y2] = box;
    const rect = svg('rect', { x: x1, y: y1, width: Math.max(x2 - x1, 0), height: Math.max(y2 - y1, 0), fill: 'none',
      stroke, 'stroke-width': 1.6 * unit }, parent);
    if (dashed) rect.setAttribute('stroke-dasharray', `${5 * unit} ${3 * unit}`);
    svg('title', {}, rect).textContent = text;
    const label = svg('text', { x: x1 + 3 * unit, y: Math.max(y1 + 11 * unit, 11 * unit), fill: stroke,
      'font-size': 10 * unit, 'font-family': 'sans-serif', 'font-weight': 600, stroke: '#000', 'paint-order': 'stroke',
      'stroke-width': 2.5 * unit }, parent);
    label.textContent = text;
  };

  // Detections of one image, matched as in mmzsq.report.matching.
  const iou = (a, b) => {
    const inside = Math.max(Math.min(a[2], b[2]) - Math.max(a[0], b[0]), 0)
      * Math.max(Math.min(a[3], b[3]) - Math.max(a[1], b[1]), 0);
    const union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside;
    return union > 0 ? inside / union : 0;
  };
  const compare = (image, threshold) => {
    const left = image.float.filter((box) => box[4] >= threshold);
    const right = image.quantized.filter((box) => box[4] >= threshold);
    const matched = new Set();
    const kept = new Set();
    for (const box of left) {
      let best = null;
      for (const other of right) {
        if (matched.has(other) || other[5] !== box[5] || iou(box, other) < 0.5) continue;
        if (!best || iou(box, other) > iou(box, best)) best = other;
      }
      if (best) { matched.add(best); kept.add(box); }
    }
    return { left, right, kept, matched };
  };

  const viewer = $('#viewer');
  if (viewer && data.images.length) {
    const picture = viewer.querySelector('img');
    const [left, right] = viewer.querySelectorAll('svg');
    let current = 0;
    const split = () => {
      const share = $('#split').value;
      viewer.querySelector('.line').style.left = `${share}%`;
      left.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
      right.style.clipPath = `inset(0 0 0 ${share}%)`;
    };
    const show = () => {
      const image = data.images[current];
      const threshold = Number($('#thr').value);
      const unit = Math.max(image.width, image.height) / Math.max(viewer.clientWidth, 320);
      const found = compare(image, threshold);
      picture.src = image.src;
      viewer.style.aspectRatio = `${image.width} / ${image.height}`;
      for (const node of [left, right]) {
        node.replaceChildren();
        node.setAttribute('viewBox', `0 0 ${image.width} ${image.height}`);
      }
      const text = (box) => `${className(box[5])} ${box[4].toFixed(2)}`;
      for (const box of found.left) {
        const kept = found.kept.has(box);
        drawBox(left, box, kept ? '#4cc2ff' : '#ff5a5f', text(box), unit, !kept);
      }
      for (const box of found.right) drawBox(right, box, found.matched.has(box) ? '#4cc2ff' : '#3ddc84', text(box), unit);
      $('#thr-out').textContent = threshold.toFixed(2);
      const lost = found.left.length - found.kept.size;
      $('#tally').textContent = `${found.kept.size} found by both, ${lost} lost, ${found.right.length - found.matched.size} gained`;
      [...$('#thumbs').children].forEach((thumb, index) => thumb.setAttribute('aria-pressed', index === current));
    };
    data.images.forEach((image, index) => {
      const thumb = element('button', { type: 'button', title: `image ${index + 1}` }, element('img', { src: image.src, alt: '' }));
      thumb.onclick = () => { current = index; show(); };
      $('#thumbs').append(thumb);
    });
    $('#split').oninput = split;
    $('#thr').oninput = show;
    window.addEventListener('resize', show);
    split();
    show();
  }

  const forming = $('#forming');
  if (forming && data.forming.length) {
    const slider = $('#form');
    slider.max = data.forming.length - 1;
    const show = () => {
      const state = data.forming[slider.value];
      forming.src = state.src;
      $('#form-out').textContent = `${state.stage}, iteration ${state.iteration}`;
    };
    slider.oninput = show;
    slider.value = slider.max;
    show();
  }

  const shot = (image, side, named) => {
    const overlay = svg('svg', { viewBox: `0 0 ${image.width} ${image.height}` });
    const unit = Math.max(image.width, image.height) / side;
    for (const box of image.boxes) drawBox(overlay, box, color(box[4]), className(box[4]), named ? unit : unit * 0.8);
    return element('div', { className: 'shot' }, element('img', { src: image.src, alt: image.name }), overlay);
  };
  const gallery = $('#gallery');
  if (gallery) {
    for (const image of data.gallery) {
      const tile = element('button', { type: 'button', title: image.name }, shot(image, 150, false));
      tile.onclick = () => {
        const dialog = $('#zoom');
        dialog.querySelector('div').replaceChildren(shot(image, 520, true));
        dialog.showModal();
      };
      gallery.append(tile);
    }
    $('#zoom').onclick = (event) => { if (event.target === $('#zoom')) $('#zoom').close(); };
  }

  const table = $('#layer-table tbody');
  if (table && data.layers.length) {
    const number = (value) => Number(value.toPrecision(3)).toString();
    const largest = (layer, key) => Math.max(...['weight', 'input'].map((part) => layer[part]?.[key] ?? 0));
    const layers = data.layers.map((layer, index) => ({ ...layer, index, error: largest(layer, 'error'),
      clipped: largest(layer, 'clipped'), bytes: (layer.weights * layer.w_bits) / 8, chosen: false,
      // Of all layers with as many bits, so that they compare: the fewest that were measured.
      sensitivity: layer.sensitivity ? layer.sensitivity[Math.min(...Object.keys(layer.sensitivity).map(Number))] : 0,
      growth: layer.sensitivity }));
    const measured = layers.some((layer) => layer.growth);
    const max = (key) => Math.max(...layers.map((layer) => layer[key]), 1e-9);
    const limits = { bytes: max('bytes'), error: max('error'), clipped: max('clipped'), sensitivity: max('sensitivity') };
    const meter = (kind, value, text) => {
      const bar = element('i');
      bar.style.width = `${(100 * value) / limits[kind]}%`;
      return element('td', {}, element('div', { className: `meter ${kind}` }, element('span', {}, bar), element('span', { textContent: text })));
    };
    const histogram = (title, part) => {
      const width = 340, height = 120, top = 6;
      const node = svg('svg', { viewBox: `0 0 ${width} ${height}` });
      const most = Math.max(...part.counts, 1);
      const x = (value) => ((value - part.low) / Math.max(part.high - part.low, 1e-12)) * width;
      svg('rect', { x: x(part.grid[0]), y: 0, width: Math.max(x(part.grid[1]) - x(part.grid[0]), 1), height: 100, fill: 'var(--gained)', opacity: 0.14 }, node);
      part.counts.forEach((count, bin) => {
        const size = Math.log1p(count) / Math.log1p(most) * (100 - top);
        svg('rect', { x: (bin * width) / part.counts.length, y: 100 - size, width: width / part.counts.length - 0.8, height: size, fill: 'var(--accent)' }, node);
      });
      for (const [value, anchor, place] of [[part.low, 'start', 0], [part.high, 'end', width]]) {
        svg('text', { x: place, y: 115, 'font-size': 11, fill: 'currentColor', 'text-anchor': anchor }, node).textContent = number(value);
      }
      return element('figure', {}, node, element('figcaption', { textContent:
        `${title} (logarithmic counts; the grid is shaded): error ${(100 * part.error).toFixed(1)} %, clipped ${(100 * part.clipped).toFixed(2)} %` }));
    };
    const paste = () => {
      const lines = layers.filter((layer) => layer.chosen).map((layer) => `    '${layer.name}': 8,`);
      const [before, after] = data.paste;
      $('#paste').hidden = !lines.length;
      $('#paste pre').textContent = `${before}\n${lines.join('\n')}\n${after}\n`;
    };
    let open = null;
    const render = () => {
      const key = $('#order').value;
      const sorted = [...layers].sort((a, b) => (key === 'index' ? a.index - b.index : b[key] - a[key]));
      table.replaceChildren();
      for (const layer of sorted) {
        const quantized = layer.w_bits < 32;
        const box = element('input', { type: 'checkbox', checked: layer.chosen, ariaLabel: `keep ${layer.name} at 8 bits` });
        box.disabled = !quantized || (layer.w_bits >= 8 && layer.a_bits >= 8);
        box.onclick = (event) => { event.stopPropagation(); layer.chosen = box.checked; paste(); };
        const bits = quantized ? `W${layer.w_bits}A${layer.a_bits}` : 'float';
        const row = element('tr', { title: [layer.type, layer.role, layer.reason].filter(Boolean).join(', ') },
          element('td', {}, box), element('td', { textContent: layer.name }),
          element('td', {}, element('span', { className: 'bits', textContent: bits })),
          meter('bytes', layer.bytes, `${number(layer.bytes / 1000)} kB`),
          meter('error', layer.error, layer.weight ? `${(100 * layer.error).toFixed(1)} %` : '–'),
          meter('clipped', layer.clipped, layer.weight ? `${(100 * layer.clipped).toFixed(2)} %` : '–'),
          ...(measured ? [meter('sensitivity', Math.max(layer.sensitivity, 0), layer.growth ? number(layer.sensitivity) : '–')] : []));
        row.onclick = () => { open = open === layer.name ? null : layer.name; render(); };
        table.append(row);
        if (open === layer.name && (layer.weight || layer.input || layer.growth)) {
          const parts = ['weight', 'input'].filter((part) => layer[part]).map((part) => histogram(part, layer[part]));
          if (layer.growth) {
            const values = Object.entries(layer.growth).map(([bits, growth]) => `${bits} bits: ${number(growth)}`);
            parts.push(element('p', { className: 'hint', textContent: `growth of the loss with ${values.join(', ')}` }));
          }
          table.append(element('tr', {}, element('td', { colSpan: measured ? 7 : 6 }, element('div', { className: 'histograms' }, ...parts))));
        }
      }
    };
    $('#order').onchange = render;
    $('#worst').onclick = () => {
      const free = layers.filter((layer) => (measured ? layer.growth : layer.weight) && layer.w_bits < 32
        && (layer.w_bits < 8 || layer.a_bits < 8));
      const key = measured ? 'sensitivity' : 'error';
      free.sort((a, b) => b[key] - a[key]).slice(0, 5).forEach((layer) => { layer.chosen = true; });
      render();
      paste();
    };
    $('#paste button').onclick = () => navigator.clipboard?.writeText($('#paste pre').textContent);
    render();
  }
})();
