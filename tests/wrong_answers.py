"""Plausible wrong answers to the exercises: each check must say `not yet: …` to them.

By lesson and check, at least two. A pair says what to replace in the lesson's own solution by
what; a text is a whole answer of its own.
"""
WRONG = {}

WRONG["00_tour"] = {
    "check_image_tokens": ["image_tokens = 512", "image_tokens = 32", "image_tokens = 256"],
    "check_turns": ["turns = 11", "turns = 10", "turns = 1"],
    "check_odds": ["odds = 4.5", "odds = 9", "odds = 81"],
    "check_read_box": [
        ("y1, x1, y2, x2", "y1, x1, x2, y2"),
        ("y1, x1, y2, x2", "y2, x2, y1, x1"),
        ("y1, x1, y2, x2", "x1, x2, y1, y2"),
    ],
    "check_row_length": [
        ("+ 1 + words + 1", "+ words"),
        ("(size // patch) ** 2", "size // patch ** 2"),
        ("+ 1 + words + 1", "+ 1 + words"),
    ],
    "check_mistake": [
        'seed, prompt = 5, "caption en"',
        'seed, prompt = HELD_OUT + 13, "answer en what is the meaning of life?"',
    ],
}

WRONG["01_scenes"] = {
    "check_between": ["between = 30", "between = 3000"],
    "check_pairs": ["pairs = 4", "pairs = 12", "pairs = 16"],
    "check_left_of": [
        ("truth = p.center[0] < q.center[0]", "truth = rng.integers(2)"),
        ("rng.integers(2)", "1"),
        """\
def left_of(scene, rng):
    for a in scene.objects:
        for b in scene.objects:
            if a is b: continue
            truth = a.center[0] < b.center[0]
            yield f"is the {a.name} left of the {b.name}?", _yes_no(truth)
""",
    ],
    "check_moon": [
        """\
def moon_distance(x, y, radius):
    return np.where(x > 0, 1., circle_distance(x, y, radius))
""",
        ("0.5 * radius", "0.5"),
        ("np.maximum", "np.minimum"),
        ("-bite", "bite"),
    ],
    "check_largest": [
        ("1.3 * area(second)", "area(second)"),
        ("(o.box[2] - o.box[0]) * (o.box[3] - o.box[1])", "o.box[2] - o.box[0]"),
        ("second, first =", "first, second ="),
    ],
}

WRONG["02_siglip"] = {
    "check_cut": [
        ("0, 2, 4, 1, 3, 5", "0, 4, 2, 1, 3, 5"),
        ("0, 2, 4, 1, 3, 5", "0, 2, 4, 3, 5, 1"),
        ("grid.permute(0, 2, 4, 1, 3, 5)", "grid"),
    ],
    "check_spread": ["spread_of_scores = 400", "spread_of_scores = 1"],
    "check_what_changes": [
        'what_changes = "the order of the rows"',
        'what_changes = "the numbers"',
    ],
    "check_constant": ["each = 1", "each = 5", 'each = float("nan")'],
    "check_resize": [
        ("align_corners=False", "align_corners=True"),
        ('mode="bicubic"', 'mode="bilinear"'),
        ("table.T.view", "table.reshape"),
    ],
    "check_count": [
        ("4 * (c * c + c)", "4 * c * c"),
        ("2 * 2 * c", "2 * c"),
        ("attention + mlp + norms", "attention + mlp"),
    ],
}

WRONG["03_rope"] = {
    "check_opposite": ["distance = 12", "distance = 3"],
    "check_position": ["position = 1000", "position = 6283", "position = 250"],
    "check_to_halves": [
        ("dim=1", "dim=2"),
        ("heads[:, 0::2], heads[:, 1::2]", "heads[:, 1::2], heads[:, 0::2]"),
        """\
def to_halves(weight, h):
    return weight.unflatten(0, (h, 2, -1)).transpose(1, 2).flatten(0, 2)
""",
    ],
    "check_look_back": [
        ("-distance", "distance"),
        ("turned_at(-distance, x.view(1, 1, 1, 64)).flatten(), x",
         "x, turned_at(-distance, x.view(1, 1, 1, 64)).flatten()"),
    ],
    "check_theta": [(" ** (d / (d - 2))", ""), ("d - 2", "d - 1"), ("(2 * pi)", "1")],
}

WRONG["04_kv_cache"] = {
    "check_passes": ["token_passes = 360", "token_passes = 26000", "token_passes = 100"],
    "check_piece_mask": [
        ("diagonal=past", "diagonal=t"),
        ("diagonal=past", "diagonal=past - 1"),
        (".tril(diagonal=past)", ""),
        (".tril(diagonal=past)", ".tril(diagonal=past).float()"),
    ],
    "check_megabytes": ["megabytes = 4.7", "megabytes = 18.9", "megabytes = 302"],
    "check_fit": [
        ("2 * layers * b * k * d * 2", "layers * b * k * d * 2"),
        ("* b * k", "* k"),
        ("d * 2)", "d * 4)"),
    ],
    "check_ask": [
        ("    cache.length = text_length\n", ""),
        ("cache.length = text_length", "cache.length = 0"),
        ("[:, question.shape[1]:]", "[:, :steps]"),
    ],
}

WRONG["05_gemma"] = {
    "check_feature": ["feature = 0.5", "feature = 10"],
    "check_kv_head": ["kv_head = 1", "kv_head = 5", "kv_head = 3"],
    "check_layer_forward": [
        ("layer.mlp(layer.post_attention_layernorm(x))", "layer.mlp(x)"),
        ("layer.self_attn(layer.input_layernorm(x), cos", "layer.self_attn(x, cos"),
        """\
def layer_forward(layer, x, cos, sin, mask):
    y = layer.self_attn(layer.input_layernorm(x), cos, sin, mask)
    return x + layer.mlp(layer.post_attention_layernorm(y))
""",
    ],
    "check_percent": ["percent = 67", "percent = 50", "percent = 75"],
    "check_count": [
        ("3 * c * config", "2 * c * config"),
        ("+ config.num_key_value_heads", "+ config.num_attention_heads"),
        ("num_hidden_layers * layer + c", "num_hidden_layers * layer"),
    ],
    "check_share": [
        """\
def share_by_hand(q, k, v):
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    return (q @ k.mT / q.shape[-1] ** .5).softmax(dim=-1) @ v
""",
        """\
def share_by_hand(q, k, v):
    rows = q.unflatten(1, (k.shape[1], -1))
    weights = (rows @ k[:, :, None].mT / q.shape[-1] ** .5).softmax(dim=-1)
    return (weights @ v[:, :, None]).flatten(1, 2)
""",
        ("q.reshape(b, k.shape[1], -1, d)",
         "q.reshape(b, -1, k.shape[1], t, d).transpose(1, 2).flatten(2, 3)"),
    ],
}

WRONG["06_gemma2"] = {
    "check_divisor": ["divisor = 144", "divisor = 11.31", "divisor = 16"],
    "check_patches": ["patches = 1500", "patches = 1508", "patches = 4096"],
    "check_band_of": [
        ("j <= i", "j < i"),
        ("(j <= i) & ", ""),
        ("j > i - window", "j >= i - window + 2"),
    ],
    "check_forgetful": [
        ("sliding_window - 1", "sliding_window"),
        ("2 * 2 * config", "2 * config"),
        ("slide * min(tokens, config.sliding_window - 1) + see_all * tokens",
         "(slide + see_all) * min(tokens, config.sliding_window - 1)"),
    ],
    "check_reach": [
        ("(window - 1)", "window"),
        ("len(layer_types) * (window - 1)", "len(layer_types) * window - 1"),
        ("    if FULL in layer_types: return None\n", ""),
    ],
}

WRONG["07_paligemma"] = {
    "check_allowed": ["allowed = 78", "allowed = 144", "allowed = 87"],
    "check_nothing": [
        "loss_of_nothing = 17.97",
        "loss_of_nothing = 1 / 257_216",
        "loss_of_nothing = 5.41",
    ],
    "check_loss": [
        ("logits[:, :-1]", "logits[:, 1:]"),
        (", ignore_index=-100", ".clamp(min=0)"),
        ("labels[:, 1:].flatten()", "labels[:, :-1].flatten()"),
    ],
    "check_answers": [
        "def answers_mask(part): return prefix_lm_mask((part > 0).int()[None])[0, 0]",
        (" & not_after", ""),
        ("(part == 0) | same & not_after", "((part == 0) | same) & not_after"),
    ],
    "check_by_row": [
        ("losses.sum(dim=1) / (targets != -100).sum(dim=1)", "losses.mean(dim=1)"),
        ("labels[:, 1:], logits[:, :-1]", "labels[:, :-1], logits[:, 1:]"),
        ("(losses.sum(dim=1) / (targets != -100).sum(dim=1)).mean()", "losses.mean()"),
    ],
}

WRONG["10_processing"] = {
    "check_to_tensor": [
        ("permute(2, 0, 1)", "permute(2, 1, 0)"),
        ("permute(2, 0, 1)", "flip(2).permute(2, 0, 1)"),
        (" / 127.5 - 1", " / 255"),
    ],
    "check_num_bytes": ["num_bytes = 6", "num_bytes = 7", "num_bytes = 12"],
    "check_num_tokens": ["num_tokens = 3", "num_tokens = 7", "num_tokens = 2"],
    "check_picture": [
        (".round()", ""),
        ("permute(1, 2, 0)", "permute(2, 1, 0)"),
        ("(pixels + 1) / 2", "pixels"),
    ],
    "check_decode": [
        'def naive_decode(tokens): return "".join(tokens).replace("▁", " ")',
        """\
def naive_decode(tokens):
    def text(token):
        if token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode(errors="replace")
        return token.replace("▁", " ")
    return "".join(map(text, tokens))
""",
    ],
}

WRONG["11_generation"] = {
    "check_times": ["times_as_likely = 6", "times_as_likely = 1.5", "times_as_likely = 3"],
    "check_stay": ["stay = 2", "stay = 4", "stay = 5"],
    "check_write_rows": [
        ("        if step: new = new.masked_fill(done, pad)\n", ""),
        ("done.all()", "done.any()"),
        ("done = (new == eos) | done", "done = new == eos"),
    ],
    "check_min_p": [
        ("math.log(0.1)", "0.1"),
        ("logits.amax(-1, keepdim=True)", "logits.amax()"),
        """\
def min_p(ids, logits):
    p = logits.softmax(-1)
    return logits.masked_fill(p < 0.1, -math.inf)
""",
    ],
    "check_no_echo": [
        ("ids[:, -1:]", "ids"),
        ("ids[:, -1:]", "ids[:, :1]"),
        "def no_echo(ids, logits): logits[:, ids[:, -1]] = -math.inf; return logits",
    ],
}

WRONG["12_attention"] = {
    "check_likely": ["likely = 0.5", "likely = 0.733", "likely = 0.72"],
    "check_rows": [
        ("[:, :, t - 1:-1]", "[:, :, t - 1:]"),
        ("[:, :, t - 1:-1]", "[:, :, t - 2:-2]"),
        ("[:, :, t - 1:-1]", "[:, :, :, t - 1:-1]"),
    ],
    "check_share": ["share = 0.25", "share = 0.5", "share = 0.75"],
    "check_believe": [
        (".prod(dim=1)", ".mean(dim=1)"),
        (".prod(dim=1)", "[:, 0]"),
        (".prod(dim=1)", ".prod(dim=1).softmax(dim=0)"),
    ],
    "check_occlude": [
        ("before - answer_probs", "1 - answer_probs"),
        ("[:, i]", "[:, 0]"),
        ("repeat(n, 1, 1, 1)", "expand(n, -1, -1, -1)"),
    ],
}

WRONG["13_hub"] = {
    "check_is_note": [
        'def is_note(path): return path.read_text().startswith("version")',
        'def is_note(path): return b"git-lfs" in path.read_bytes()[:200]',
        'def is_note(path): return path.suffix == ".safetensors"',
    ],
    "check_new_blobs": ["new_blobs = 5", "new_blobs = 0", "new_blobs = 6"],
    "check_megabytes": ["megabytes = 0", "megabytes = 15.2", "megabytes = 22.8"],
    "check_to_fetch": [
        ('int(text.split("size ")[1]) for text', "len(text) for text"),
        ("if is_pointer(path)", "if is_pointer(path) and path.name == WEIGHTS"),
        """\
def to_fetch(folder):
    return sum(path.stat().st_size for path in folder.iterdir())
""",
    ],
    "check_unused": [
        ('(cache / "snapshots" / v).iterdir()',
         '(cache / "snapshots" / v).iterdir() if link.name == WEIGHTS'),
        ("- used", "& used"),
        """\
def unused(cache):
    links = (cache / "snapshots").glob("*/*")
    used = {os.readlink(link).split("/")[-1] for link in links}
    return {path.name for path in (cache / "blobs").iterdir()} - used
""",
    ],
}

WRONG["14_checkpoint"] = {
    "check_offset": ["last_offset = 24", "last_offset = 26", "last_offset = 62"],
    "check_kept": ["kept = 1001", "kept = 1004", "kept = 1024"],
    "check_check": [
        """\
def check_names(expected, found):
    if len(expected) != len(found): raise ValueError('b and c differ')
""",
        """\
def check_names(expected, found):
    if found - expected: raise ValueError(f'surplus {found - expected}')
""",
        """\
def check_names(expected, found):
    if expected != found: raise ValueError('names differ')
""",
    ],
    "check_memory_key": [
        ("    if name == \"language_model.lm_head.weight\": return \"lm_head.weight\"\n", ""),
        ('.replace("vision_tower.vision_model.", "vision_tower.", 1)', ""),
        ('"model." + ', ""),
    ],
    "check_seal": [
        ("{name} {x.dtype} ", "{x.dtype} "),
        (" {x.dtype} {list(x.shape)}", " {x.dtype}"),
        (" {x.dtype}", ""),
        ("published_key(key)", "key"),
        ("        digest.update(bytes(x.flatten().view(torch.uint8).numpy()))\n", ""),
    ],
}

WRONG["15_detection"] = {
    "check_off": ["pixels_off = 3.91", "pixels_off = 0.5", "pixels_off = 1.95"],
    "check_overlap": ["overlap = 0.75", "overlap = 0.5", "overlap = 0.8"],
    "check_bins_in": [
        """\
def bins_in(text):
    marks = [int(mark) for mark in re.findall(r"<loc(\\d{4})>", text)]
    return [tuple(marks[i:i + 4]) for i in range(0, len(marks) - 3, 4)]
""",
        ("len(box) == 4", "len(box) > 2"),
        ("if len(box) == 4", ""),
    ],
    "check_read_cell": [
        ("(index + 0.5) / 1024", "index / 1023"),
        ("(index + 0.5) / 1024", "(index + 1) / 1024"),
        ("(index + 0.5) / 1024", "(index + 0.5) / 1023"),
    ],
    "check_mirror": [
        ("1023 - x2, y1, 1023 - x1, y2", "1023 - x1, y1, 1023 - x2, y2"),
        ("1023 - x2, y1, 1023 - x1, y2", "x1, 1023 - y2, x2, 1023 - y1"),
        ("size = (1023, 1023)", "size = (100, 100)"),
    ],
}

WRONG["16_segmentation"] = {
    "check_bits": ["num_bits = 224", "num_bits = 512", "num_bits = 64"],
    "check_numbers": ["numbers = 16", "numbers = 94", "numbers = 32"],
    "check_put": [
        ("np.zeros(size[::-1], bool)", "np.zeros(size, bool)"),
        ("(x2 - x1, y2 - y1)", "(y2 - y1, x2 - x1)"),
        ("    small = Image.fromarray(square).resize((x2 - x1, y2 - y1))",
         "    small = np.asarray(Image.fromarray(square).resize((y2 - y1, x2 - "
         "x1))).T"),
    ],
    "check_mirror": [
        """\
def mirror(codes):
    return tuple(np.reshape(codes, (4, 4))[:, ::-1].flatten().tolist())
""",
        ("mask[:, ::-1]", "mask[::-1]"),
        ("mask[:, ::-1]", "mask"),
    ],
    "check_decode_exactly": [
        ("    part = [64 + 64 * (v - low) / (high - low) for v, low, high in\n"
         "            ((left, x1, x2), (top, y1, y2), (right, x1, x2), (bottom, "
         "y1, y2))]\n"
         "    shown = Image.fromarray(square).resize(\n"
         "        (right - left, bottom - top), Image.Resampling.BILINEAR, "
         "box=part)\n",
         "    square = torch.from_numpy(square)[None, None, 64:128, 64:128]\n"
         "    shown = F.interpolate(square, (bottom - top, right - left), "
         "mode=\"bilinear\",\n"
         "                          align_corners=True)[0, 0]\n"),
        ("np.floor(box[:2]), *np.ceil(box[2:])", "np.floor(box[:2]), *np.floor(box[2:])"),
        ("box=part", "box=(64, 64, 128, 128)"),
    ],
}

WRONG["19_kernels"] = {
    "check_at_once": ["at_once = 64", "at_once = 8", "at_once = 256"],
    "check_percent": ["percent = 1", "percent = 35", "percent = 44"],
    "check_to_bytes": [
        ("amax(dim=1, keepdim=True)", "amax(dim=0, keepdim=True)"),
        ("/ 127", "/ 255"),
        (".round()", ".round().abs()"),
    ],
    "check_longest": [
        "def longest(bits): return 2**bits",
        ("2**(bits - 1) - 1", "2**bits - 1"),
        ("127**2", "128**2"),
    ],
}

WRONG["20_big_vision"] = {
    "check_output_matrix": [
        ("w.flatten(0, 1).T", "w.reshape(w.shape[2], -1)"),
        ("w.flatten(0, 1).T", "w.transpose(0, 1).flatten(0, 1).T"),
        ("w.flatten(0, 1).T", "w.flatten(0, 1)"),
    ],
    "check_gigabytes": ["gigabytes = 1.21", "gigabytes = 4.83", "gigabytes = 0.13"],
    "check_number": ["number = 2.5", "number = 2.313", "number = 4.25"],
    "check_split": [
        ('"HCD", "HD C"', '"HCD", "DH C"'),
        "def split_qkv(w): return [x.flatten(0, 1).T.reshape(24, 10) for x in w]",
        """\
def split_qkv(w):
    return [to_published(x, "HCD", "HD C") for x in (w[0], w[2], w[1])]
""",
    ],
    "check_piece": [
        ('"img/Transformer/encoderblock/", "llm/layers/"',
         '"img/Transformer/encoderblock/", "img/"'),
        ("shape[1:] if key.startswith(stacks) else shape", "shape[1:]"),
        ("4 * max", "2 * max"),
    ],
}

WRONG["21_quantization"] = {
    "check_back": ["comes_back = 0.33", "comes_back = 0", "comes_back = 0.4"],
    "check_bits": ["bits_each = 4", "bits_each = 5", "bits_each = 4.25"],
    "check_to_levels": [
        ("/ 15\n"
         "    return ((group - group.min()) / step).round()",
         "/ 16\n"
         "    return ((group - group.min()) / step).round().clamp(max=15)"),
        ("/ 15\n"
         "    return ((group - group.min()) / step).round()",
         "/ 16\n"
         "    return ((group - group.min()) / step).floor().clamp(max=15)"),
        ("(group.max() - group.min()) / 15", "group.abs().max() / 15"),
    ],
    "check_symmetric": [
        ("/ 7", "/ 8"),
        (".round()", ".floor()"),
        ("groups.abs().amax(dim=-1, keepdim=True)", "groups.abs().amax()"),
    ],
}

WRONG["22_speed"] = {
    "check_intensity": ["for_each_byte = 32", "for_each_byte = 8", "for_each_byte = 64"],
    "check_operations": [
        ("2 * rows", "rows"), ("weight.nbytes", "weight.numel()"), ("rows * ", "")],
    "check_gigabytes": ["gigabytes = 5", "gigabytes = 195", "gigabytes = 8"],
    "check_free_rows": [
        ("peak / 2", "peak"),
        ("bits / 8", "bits"),
        ("bits / 8 / bandwidth * peak / 2", "peak / bandwidth"),
    ],
}

WRONG["23_lora"] = {
    "check_trained": ["trained = 8_000", "trained = 4_000", "trained = 2_000_000"],
    "check_merge": [
        ("alpha / len(a)", "alpha"),
        ("b @ a", "a.T @ b.T"),
        ("alpha / len(a) * ", ""),
    ],
    "check_factor": ["factor = 2", "factor = 16", "factor = 512"],
    "check_size": [
        ("config.num_hidden_layers * rank", "config.num_hidden_layers * 8"),
        ("k_proj=c + k, v_proj=c + k", "k_proj=c + q, v_proj=c + q"),
        ("down_proj=m + c", "down_proj=m + m"),
    ],
    "check_stack": [
        ("scale1 * b1, scale2 * b2", "b1, b2"),
        ("torch.cat((a1, a2)), torch.cat((scale1 * b1, scale2 * b2), dim=1)",
         "torch.cat((scale1 * a1, scale2 * a2)), torch.cat((scale1 * b1, scale2 "
         "* b2), dim=1)"),
        ("return torch.cat((a1, a2)), torch.cat((scale1 * b1, scale2 * b2), dim=1)",
         "return torch.eye(20), scale1 * b1 @ a1 + scale2 * b2 @ a2"),
    ],
}

WRONG["24_opening"] = {
    "check_objects": ["objects = 4", "objects = 2"],
    "check_looks": ["looks = 20", "looks = 5", "looks = 1"],
    "check_remembered": [
        ("path.stat().st_mtime_ns, path.stat().st_size", "path.stat().st_size"),
        "def remembered(path, read, memory): return read(path)",
        ("!= state", "is None"),
    ],
    "check_count": [
        "def count(image, names): return dict.fromkeys(names, 2)",
        ("len(a.detections)", "len(a.text) > 0"),
        ('f"detect {name}" for name in names', 'f"detect {names[0]}" for name in names'),
    ],
}

WRONG["30_tasks"] = {
    "check_precision": ["precision = 1", "precision = 0.44", "precision = 0.5"],
    "check_points": ["points = 0.4", "points = 20", "points = 1.6"],
    "check_exam": [
        ("HELD_OUT + seed", "HELD_OUT - num + seed"),
        ("make_scene(HELD_OUT + seed)", "make_scene(HELD_OUT)"),
        ("HELD_OUT + seed) for seed in range(first, first + num)",
         "seed) for seed in range(HELD_OUT - 1, HELD_OUT + num - 1)"),
    ],
    "check_by_objects": [
        ("        if \"iou\" not in a.marks: continue\n", ""),
        ('append(a.marks["iou"])', 'append(a.marks["iou"] > 0.5)'),
        ("float(np.mean(ious))", "float(np.sum(ious))"),
    ],
}

WRONG["31_training"] = {
    "check_part": ["part = 0.5", "part = 0.25", "part = 0.2"],
    "check_length": ["squared_length = 68.25", "squared_length = 1", "squared_length = 10.5"],
    "check_descend": [
        ("        optimizer.zero_grad()\n"
         "        (w * batch).mean().backward()\n",
         "        (w * batch).mean().backward()\n"
         "        optimizer.zero_grad()\n"),
        ("    for batch in batches:\n"
         "        optimizer.zero_grad()\n",
         "    optimizer.zero_grad()\n"
         "    for batch in batches:\n"),
        ("        optimizer.step()", "    optimizer.step()"),
    ],
    "check_cosine": [
        ("(step + 1) / warmup", "step / warmup"),
        ("(step - warmup) / (steps - warmup)", "step / steps"),
        ("(1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2",
         "1 - (step - warmup) / (steps - warmup)"),
    ],
    "check_color_alone": [
        ("387 / 2) / 3985", "387) / 3985"),
        ("387 / 2) / 3985", "387 / 2 + 133) / 3985"),
        ("3361 + 107 + 194", "3361 + 194"),
        "color_alone, ours = .95, .95",
    ],
}

WRONG["32_mask_training"] = {
    "check_slope": ["slope = -0.8", "slope = 0", "slope = 1"],
    "check_choose": [
        ("x + (nearest - x).detach()", "nearest"),
        ("x + (nearest - x).detach()", "x"),
        ("(nearest - x).detach()", "nearest - x.detach()"),
    ],
    "check_first": ["first_number = 0.2", "first_number = 1", "first_number = 0.11"],
    "check_effective_codes": [
        ("uses[uses > 0]", "uses"),
        ("np.log2", "np.log"),
        ("2 ** -(p * np.log2(p)).sum()", "-(p * np.log2(p)).sum()"),
    ],
}

WRONG["33_contrastive"] = {
    "check_no": [
        "loss_of_no = 70",
        "loss_of_no = 80",
        "loss_of_no = 5.5",
        "loss_of_no = 1.25",
    ],
    "check_one_line": [
        (', reduction="sum") / len(logits)', ")"),
        ('F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") '
         "/ len(logits)",
         "F.cross_entropy(logits, torch.arange(len(logits)))"),
        ("torch.eye(len(logits))", "torch.ones_like(logits)"),
    ],
    "check_held": ["held = 256", "held = 1024", "held = 32"],
    "check_fair": [
        ("i == j or captions[i] != captions[j]", "captions[i] != captions[j]"),
        ("/ n", "/ counted.sum()"),
        ("i == j or captions[i] != captions[j]", "captions[i] == captions[j]"),
    ],
    "check_recall": [
        ("better < k", "better <= k"),
        ("logits.diagonal()[:, None]).sum(1)", "logits.diagonal()).sum(0)"),
        ("logits > logits", "logits >= logits"),
    ],
}

WRONG["34_datasets"] = {
    "check_nats": ["nats = 5", "nats = math.log(5)", "nats = math.log(24)"],
    "check_guess": [
        "my_guess = [True] * 6",
        "my_guess = [False, True, False, False, False, True]",
        "my_guess = [True, False, False, False, False, True]",
    ],
    "check_yolo": [
        ("in_order(things)", "things"),
        ("from_yolo_box([float(n) for n in numbers], size)",
         "tuple(float(n) * 112 for n in numbers)"),
        ("                 for name, things in found.items()]",
         "                 for name, things in found.items() if things]"),
    ],
    "check_cure": [
        "def cure(rows): return []",
        ("    for name in names:", "    for name in names[:0]:"),
        ("in_order(objects.values())", "objects.values()"),
    ],
}

WRONG["35_finetuning"] = {
    "check_of_batch": ["of_batch = 2", "of_batch = 2.5", "of_batch = 4"],
    "check_steps": ["steps_needed = 3", "steps_needed = 10", "steps_needed = 40"],
    "check_fit": [
        ("[ids for ids in answers if len(ids) <= limit]",
         "[ids[:limit - 1] + ids[-1:] for ids in answers]"),
        ("[ids for ids in answers if len(ids) <= limit]", "[ids[-limit:] for ids in answers]"),
        ("<= limit", "< limit"),
        ("[ids for ids in answers if len(ids) <= limit]", "answers"),
    ],
    "check_old_rows": [
        """\
def old_rows(batch_size, share, steps):
    return round(batch_size * share * steps)
""",
        ("round(batch_size * share) * steps", "batch_size * steps"),
        ("round", "math.ceil"),
    ],
    "check_repeats": [
        ("k=1", "k=0"),
        ("np.triu(box_iou(boxes, boxes), k=1)", "box_iou(boxes, boxes) - np.eye(len(boxes))"),
        ("    if not boxes: return 0.\n", ""),
    ],
}

WRONG["36_stages"] = {
    "check_deviation": ["deviation = .08", "deviation = .04", "deviation = .08 / 4"],
    "check_difference": [("ddof=1", "ddof=0"), (" / len(d) ** .5", ""), ("a - b", "b - a"),
                         ("len(d) ** .5", "len(d)")],
    "check_best": ["def best(losses): return min(losses, key=losses.get)",
                   ("(rates[0], rates[-1])", "rates[-1:]"), ("min(", "max("),
                   "def best(losses): return 2e-3"],
    "check_bytes": [("2 * 4 * 48 * 4", "4 * 48 * 4"), ("4 * one", "one"),
                    "one, four = 768, 3072"],
    "check_always": ['at_4500, at_5000 = "no", "yes"', 'at_4500, at_5000 = "yes", "yes"'],
    "check_pairs": ["tokens, times = 1024, 16", "tokens, times = 4096, 16",
                    "tokens, times = 896, 256"],
}

WRONG["37_reward"] = {
    "check_leave_one_out": [("(n - 1)", "n"), ("r - (r.sum", "(r.sum"), ("axis=1", "axis=0")],
    "check_worth": ["def worth(ratio, advantage): return ratio * advantage",
                    ("torch.min", "torch.max"), ("clamp(.8, 1.2)", "clamp(.8)")],
    "check_no_news": ["advantage = 1.", "advantage = 1 / 8"],
    "check_close_count": [("1: .5", "1: .4"),
                          ("abs(int(text) - int(truth))", "int(text) - int(truth)")],
}

WRONG["43_labelling"] = {
    "check_answers_left": ["answers_left = 699_999", "answers_left = 999_999",
                           "answers_left = 1_000_000"],
    "check_kept": [
        ("found = right[np.argsort(-scores)]", "found = right"),
        ("-scores", "scores"),
        ("fine[-1] + 1", "len(fine)"),
        ("fine[-1]", "fine[0]"),
    ],
    "check_save": [
        ('f".{path.name}"', 'f"{path.name}.aside"'),
        ("    os.replace(aside, path)", "    path.write_text(aside.read_text())"),
        """\
def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\\n" for row in rows))
""",
        """\
def save(path, rows):
    path.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}")
    aside.write_text("".join(json.dumps(row) + "\\n" for row in rows))
    os.replace(aside, path)
""",
    ],
    "check_lost": ["lost_pictures = 64", "lost_pictures = 1", "lost_pictures = 16"],
    "check_waiting": [
        ("places(lengths, size)", "(len(lengths) * max(lengths))"),
        ("1 - sum", "sum"),
        ("places(lengths, size)", "places(lengths)"),
    ],
}

WRONG["44_serving"] = {
    "check_mean_wait": ["mean_wait = 1.3", "mean_wait = 2.6", "mean_wait = 3.4"],
    "check_open_small": [
        ("image.width * image.height > most", "max(image.size) > most"),
        ("image.width * image.height > most", "len(data) > most"),
        ("image.width * image.height > most", "image.width * image.height >= most"),
        ("to_rgb(image)", "image"),
    ],
    "check_events": ["events_sent = 1", "events_sent = 2", "events_sent = 3"],
    "check_text_of": [
        ("choice for chunk in chunks for choice in chunk[\"choices\"]",
         "chunk[\"choices\"][0] for chunk in chunks"),
        ('.get("content", "")', '["content"]'),
        ('"".join', '" ".join'),
        ("[line.removeprefix(\"data: \") for line in raw.splitlines() if line]",
         "raw.split(\"data: \")[1:]"),
    ],
    "check_most_served": [
        ("most / (.9 + .1 * most)", "most"),
        ("most / (.9", "1 / (.9"),
        ("most / (.9 + .1 * most)", "1 / (.9 + .1)"),
    ],
}

WRONG["45_scale"] = {
    "check_ten_tokens": ["ten_tokens = 3.", "ten_tokens = (9 * 4 + 1 * 2) / 10",
                         "ten_tokens = 22"],
    "check_clipped": [
        (".clamp(min=1)", ""),
        ("mean(dim=0)", "sum(dim=0)"),
        ("gradients.mean(dim=0)", "(gradients / gradients.norm(dim=1, keepdim=True)).mean(0)"),
    ],
    "check_length": [
        "def length(shares): return sum(share.norm() for share in shares)",
        ("for share in shares)", "for share in shares) / len(shares)"),
        ("(share ** 2).sum()", "(share ** 2).mean()"),
        (" ** .5", ""),
    ],
    "check_gigabytes": ["gigabytes = 2.92 * 4", "gigabytes = 2.92 * 16",
                        "gigabytes = 2.92 * 20"],
    "check_cards": [
        ('"FSDP"', '"data parallel"'),
        ('"FSDP"', '"LoRA, FSDP"'),
        ("(1, 2, 4, 8, 16, 32, 64)", "(1, 8, 64)"),
        """\
def cards(config, gigabytes):
    return -(-bytes_a_process(config, "FSDP", 1).total // (1e9 * gigabytes))
""",
    ],
}

WRONG["46_export"] = {
    "check_counting": ["numbers = [3, 4, 5]", "numbers = [1, 2, 3]", "numbers = [1, 1, 1]"],
    "check_remembering": [
        ("        calls = calls + 1\n", ""),
        ("return x * calls, calls", "return x * calls, calls + 1"),
        ("        calls = calls + 1\n        return x * calls, calls",
         "        return x * (calls + 1), calls"),
    ],
    "check_greedy": [
        ("embed(torch.tensor([[ids[-1]]]))",
         "torch.cat((embeds, embed(torch.tensor([[ids[-1]]]))), dim=1)"),
        """\
def greedy(decoder, embed, embeds, count):
    past, ids = {f"{i}": torch.zeros(1, 1, 0, 48) for i in range(8)}, []
    for _ in range(count):
        logits, *_ = decoder(embeds, torch.ones(embeds.shape[:2]), past, torch.tensor(1))
        ids.append(logits[0, -1].argmax().item())
        embeds = embed(torch.tensor([[ids[-1]]]))
    return ids
""",
    ],
    "check_bytes_of_graphs": [
        ("2 * table + rest", "table + rest"),
        ("return 2 *", "return 4 *"),
        ("2 * table + rest", "2 * (table + rest)"),
    ],
    "check_loop": [
        ("[ids[-1:]]", "[ids]"),
        ("embeds = graphs.run(\"embed_tokens\", input_ids=torch.tensor([ids[-1:]]))",
         "_ = graphs.run(\"embed_tokens\", input_ids=torch.tensor([ids[-1:]]))"),
        ("input_ids=torch.tensor([ids[-1:]])", "input_ids=torch.tensor([[n]])"),
    ],
    "check_order": ["other_order = -1", "other_order = 1e8", "other_order = 0.5"],
    "check_undecided": [
        ("2 * error", "error"),
        ("2 * error", "4 * error"),
        ("second < 2", "second > 2"),
    ],
}

WRONG["47_practice"] = {
    "check_lines_kept": ["lines_kept = 4", "lines_kept = 5", "lines_kept = 7"],
    "check_unfinished": [
        "def unfinished(source): return marked(source)",
        ("if is_stub", "if not is_stub"),
        ("is_stub(source, name)", '"NotImplementedError" in source'),
    ],
    "check_holds": [
        ("except Exception: return False",
         "except (AssertionError, NotImplementedError): return False"),
        ("    return True", "        return True"),
        """\
def holds(source, tests):
    exec(source, names := {})
    try: exec(tests[0], names)
    except Exception: return False
    return True
""",
    ],
    "check_say_so": ["say_so = 1", "say_so = 3", "say_so = 4"],
}

WRONG["48_command"] = {
    "check_flags": [
        'flags = {"nosample": True}, {"notable": True}',
        'flags = {"sample": False}, {"notable": True}',
    ],
    "check_tell": [
        ("    print(answer)", "    print(answer, file=sys.stderr)"),
        ("    print(f\"device: {device}\", file=sys.stderr)\n", ""),
        (", file=sys.stderr", ""),
    ],
    "check_exit_code": ["exit_code = 15", "exit_code = 130", "exit_code = 2"],
    "check_as_size": [
        "def as_size(text): return tuple(map(int, text.split('x')))",
        ("if min(width, height) >= 1: ", ""),
        ("got {text!r}", "got something else"),
    ],
}

WRONG["49_inference"] = {
    "check_check_temperature": [
        ('not 0 <= temperature < float("inf")',
         "temperature < 0 or temperature != temperature"),
        ("0 <= temperature", "0 < temperature"),
        (' < float("inf")', ""),
    ],
    "check_batches": ["batches = 2", "batches = 48", "batches = 16"],
    "check_calls": ["calls_of_batch = 35", "calls_of_batch = 8", "calls_of_batch = 5"],
    "check_two_ways": [
        ("found.detections", "found.text"),
        ("said.text, len(found.detections)", "said.text, int(said.text == 'yes')"),
        ("detect {name}", "detect {name.split()[1]}"),
    ],
    "check_mask_of": [
        (".reshape(width, height).T", ".reshape(height, width)"),
        ("% 2 == 1", "% 2 == 0"),
    ],
}
