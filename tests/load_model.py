"""What the loader leaves in the PEs' buffers, from the contract; and a memory that stalls.

A job is a `Job`: plain lists of codes, scales, weights and a memory that holds them.
"""

import collections
import functools

from tests.pe_model import nibbles, port_bytes

PADDING = 0xFFFF
PORTS = ("dense_codes", "dense_records", "sparse_entries", "sparse_records")


def ceil(value, by):
    return -(-value // by)


class Memory:
    """Words at addresses, read through a `ReadPort` with a latency, stalled at random."""

    def __init__(self, rng, latency=1, stalls=(0, 0)):
        self.rng, self.latency, self.stalls = rng, latency, stalls
        self.words, self.reads = {}, []
        self.waiting, self.offered, self.cycle = collections.deque(), None, 0

    def place(self, address, words):
        for n, word in enumerate(words):
            assert self.words.setdefault(address + n, word) == word, "regions must not overlap"

    def before(self, ctx, read):
        """Drive the port in a cycle; to be called before its outputs are looked at."""
        if self.offered is None and self.waiting and self.waiting[0][0] <= self.cycle:
            if self.rng.random() >= self.stalls[1]:
                self.offered = self.waiting.popleft()[1]
        self.ready = self.rng.random() >= self.stalls[0]
        ctx.set(read.request.ready, self.ready)
        ctx.set(read.response.valid, self.offered is not None)
        ctx.set(read.response.payload, 12345 if self.offered is None else self.offered)

    def after(self, ctx, read):
        """What has been asked and taken in this cycle."""
        if ctx.get(read.request.valid) and self.ready:
            address = ctx.get(read.request.payload)
            self.reads.append(address)
            self.waiting.append((self.cycle + self.latency, self.words.get(address, 0)))
        if self.offered is not None and ctx.get(read.response.ready):
            self.offered = None
        self.cycle += 1

    @property
    def idle(self):
        return not self.waiting and self.offered is None


def random_operands(config, rng, boundary):
    """Options of a `Job` that say which codes it has and how they are split over the core's sides.

    ``boundary``: share of the jobs that have a word whose side depends on the pixel.
    """
    mx = rng.random() < 0.3
    slots = 32 if mx else rng.choice((32, 64))
    n = rng.randrange(slots - config.vector + 1, slots + 1)
    low, high, cut = rng.randrange(n + 1), None, 0
    if config.sparse_pes == 0:
        low = n
    elif config.dense_pes == 0:
        low = 0
    elif rng.random() < boundary:
        low = low // config.vector * config.vector
        high, cut = min(n, low + config.vector), rng.randrange(256)
    return {"mx": mx, "slots": slots, "n": n, "low": low, "high": high, "cut": cut,
            "kernel": rng.choice((1, 3))}


class Job:
    """A tile of random operands: ``slots`` of which ``n`` are in the list, split low/high/cut."""

    def __init__(self, config, rng, *, mx=False, height=5, width=6, kernel=3, outputs=20, slots=32,
                 n=None, low=None, high=None, cut=0, tile=None, share=1, keep_weights=False,
                 density=0.4, signed=False, dense_limit=255):
        self.config, self.mx, self.kernel, self.outputs = config, mx, kernel, outputs
        self.height, self.width, self.share, self.slots = height, width, share, slots
        self.keep_weights, self.signed, self.dense_limit = keep_weights, signed, dense_limit
        self.y, self.x, self.tile_height, self.tile_width = tile or (0, 0, height, width)
        self.n = slots if n is None or mx else n
        self.low = self.n if low is None or mx else low
        self.high = self.low if high is None or mx else high
        self.cut = 0 if mx else cut
        self.planes = 2 if mx else 1
        self.taps = kernel * kernel
        vector = config.vector
        self.words = ceil(self.n, vector)
        self.border = 1 if kernel == 3 else 0
        order = list(range(slots)) if mx else rng.sample(range(slots), self.n)
        holes = rng.sample(range(slots), rng.randrange(4)) if mx else ()
        self.list = [PADDING if slot in holes else slot for slot in order]
        # codes[pixel][plane][position]
        self.codes = [[[rng.randrange(1, 16) if position < self.n and rng.random() < density else 0
                        for position in range(self.words * vector)] for _ in range(self.planes)]
                      for _ in range(height * width)]
        self.scales = [rng.randrange(256) for _ in range(height * width)]
        self.output_words = ceil(outputs, vector)
        self.rng = rng

    @functools.cached_property
    def weights(self):
        """Codes, ``[slot][tap][plane][output]``."""
        return [[[[self.rng.randrange(16) for _ in range(self.output_words * self.config.vector)]
                  for _ in range(self.planes)] for _ in range(self.taps)]
                for _ in range(self.slots)]

    @functools.cached_property
    def weight_scales(self):
        """Codes, ``[tap][output]``."""
        return [[self.rng.randrange(127) for _ in range(self.output_words * self.config.vector)]
                for _ in range(self.taps)]

    @functools.cached_property
    def table(self):
        """Port words of the epilogue table."""
        return [self.rng.getrandbits(self.config.port_width) for _ in range(
            self.output_words * self.config.vector * 64 // self.config.port_width)]

    def store(self, memory, rng, weights=True):
        """Put the operands into memory; addresses and pitches as fields of the descriptor.

        Without ``weights`` only codes and scales.
        """
        config, vector = self.config, self.config.vector
        port_bytes_of_word = config.port_width // 8
        place = 1 + max(memory.words, default=0)
        fields = {}

        def put(name, words):
            nonlocal place
            place += rng.randrange(5)
            fields[name] = place
            memory.place(place, words)
            place += len(words)

        if weights:
            self.store_weights(put, rng, fields)
        put("source", [nibbles(plane[first:first + vector]) for pixel in self.codes
                       for plane in pixel for first in range(0, len(plane), vector)])
        byte = rng.randrange(port_bytes_of_word)
        put("scales", port_bytes(config, [55] * byte + self.scales))
        return {**fields, "scale_byte": byte}

    def store_weights(self, put, rng, fields):
        """List, table, weight scales and weights."""
        config, vector, quad = self.config, self.config.vector, self.config.quad
        entries = self.list + [PADDING] * (self.words * vector - self.n)
        head = self.n | self.low << 16 | self.high << 32 | self.cut << 48
        put("permutation", [head] + [
            sum(entry << 16 * n for n, entry in enumerate(entries[first:first + quad]))
            for first in range(0, len(entries), quad)]
            + [rng.getrandbits(config.port_width) for _ in range(
                (self.slots - len(entries)) // quad)])
        put("table", self.table)
        pitch = 2 * self.output_words + rng.randrange(3)
        put("weight_scales", [word for line in self.weight_scales for word in (
            port_bytes(config, line) + [99] * pitch)[:pitch]])
        weight_pitch = self.output_words + rng.randrange(3)
        put("weights", [word for slot in self.weights for tap in slot for line in tap for word in (
            [nibbles(line[first:first + vector]) for first in range(0, len(line), vector)]
            + [77] * weight_pitch)[:weight_pitch]])
        fields |= {"scale_pitch": pitch, "weight_pitch": weight_pitch}

    @property
    def low_used(self):
        return 0 if self.mx else self.low

    @property
    def dense_pitch(self):
        return ceil(self.high, self.config.vector) if self.config.dense_pes else 0

    @property
    def sparse_first(self):
        return self.low_used // self.config.vector * self.config.vector

    @property
    def sparse_pitch(self):
        return self.words * self.config.vector - self.sparse_first

    @property
    def input_rows(self):
        return (max(0, self.y - self.border),
                min(self.height, self.y + self.tile_height + self.border))

    @property
    def input_columns(self):
        return (max(0, self.x - self.border),
                min(self.width, self.x + self.tile_width + self.border))

    @property
    def group_entries(self):
        return ceil(self.n - self.low_used, self.config.sparse_rate)

    @property
    def fits(self):
        """One row of output finds room for its input, whatever that is."""
        config = self.config
        left, right = self.input_columns
        top, bottom = self.input_rows
        groups = min(self.kernel, bottom - top) * (right - left) * self.planes
        return all(2 * groups * most <= depth for most, depth in (
            (1, config.record_depth), (self.dense_pitch, config.codes_depth),
            (self.group_entries if config.sparse_pes else 0, config.entry_depth)))

    def runs(self, parity=0):
        first, result = self.y, []
        while first < self.y + self.tile_height:
            result.append(Run(self, first, (parity + len(result)) % 2))
            assert result[-1].rows > 0
            first += result[-1].rows
        return result


class Run:
    """Rows of a job that are loaded together.

    ``row``, ``rows``: of output; ``begin``, ``end``: rows of input; ``buffers``: what is written,
    a dictionary of addresses for each of `PORTS`; ``sizes``: of each row its first pixel and the
    cycles for which each code word occupies the compactor.
    """

    def __init__(self, job, first, parity):
        config = job.config
        self.job, self.row, self.parity = job, first, parity
        top, bottom = job.input_rows
        self.begin = max(0, first - job.border)
        assert self.begin >= top
        left, right = job.input_columns
        width = right - left
        self.buffers = {name: {} for name in PORTS}
        depths = {"records": config.record_depth // 2, "codes": config.codes_depth // 2,
                  "entries": config.entry_depth // 2}
        start = {name: parity * depth for name, depth in depths.items()}
        used = dict.fromkeys(depths, 0)
        worst = {"records": width * job.planes,
                 "codes": width * job.planes * job.dense_pitch if config.dense_pes else 0,
                 "entries": width * job.planes * job.group_entries if config.sparse_pes else 0}
        self.end = self.begin
        self.sizes = []
        while self.end < bottom and all(used[name] + worst[name] <= depths[name]
                                        for name in depths):
            first_byte = self.end * job.width + left
            self.sizes.append((first_byte, []))
            for q in range(first_byte, first_byte + width):
                for plane in range(job.planes):
                    self.load_group(q, plane, start, used)
            self.end += 1
        job_end = job.y + job.tile_height
        self.last = self.end == bottom
        self.rows = (job_end if self.last else self.end - job.border) - first

    def load_group(self, q, plane, start, used):
        job, config, vector = self.job, self.job.config, self.job.config.vector
        codes = job.codes[q][plane]
        record = start["records"] + used["records"]
        used["records"] += 1
        items = [(position - job.sparse_first, code) for position, code in enumerate(codes)
                 if position >= job.low_used and code]
        rate = config.sparse_rate
        if config.dense_pes:
            words = job.dense_pitch
            dense = [code if position < job.high else 0 for position, code in enumerate(codes)]
            address = start["codes"] + used["codes"]
            self.buffers["dense_records"][record] = (
                address % config.codes_depth, words, job.scales[q])
            for word in range(words):
                self.buffers["dense_codes"][address + word] = nibbles(
                    dense[word * vector:(word + 1) * vector])
            used["codes"] += words
        if config.sparse_pes:
            entries = [items[n:n + rate] for n in range(0, len(items), rate)]
            address = start["entries"] + used["entries"]
            early = sum(position + job.sparse_first < job.high for position, _ in items)
            skip = early // rate if early < len(items) else len(entries)
            self.buffers["sparse_records"][record] = (
                address % config.entry_depth, len(entries), job.scales[q], skip)
            for n, entry in enumerate(entries):
                self.buffers["sparse_entries"][address + n] = entry
            used["entries"] += len(entries)
        counted = 0
        for first in range(0, len(codes), vector):
            before = counted // rate
            counted += sum(first <= position + job.sparse_first < first + vector
                           for position, _ in items)
            full = counted // rate - before
            full += first + vector == len(codes) and counted % rate > 0
            self.sizes[-1][1].append(max(1, full) if config.sparse_pes else 1)


def decoded_scale(code, mx):
    """Byte of a weight scale as the PEs keep it: factor, then shift."""
    exponent = code >> 3 & 15
    if mx:
        return 1 | (code & 15) << 4
    return (code & 7) + 8 * (exponent > 0) | (max(exponent, 1) - 1) << 4


class Weights:
    """What a job leaves in the buffers that its runs share.

    ``rows``: rows of each memory; ``place``: the first ones; ``buffers``: words by (address,
    column), for the sparse side by (PE, address, column).
    """

    def __init__(self, job, top, bank):
        config = job.config
        sizes = layer_sizes(job)
        depths = {"dense_weights": config.weight_depth,
                  "dense_weight_scales": config.weight_scale_depth,
                  "sparse_weights": config.sparse_weight_depth,
                  "sparse_weight_scales": config.sparse_weight_scale_depth}
        lines, own = job.taps * job.planes, sizes["sparse_own"]
        self.rows = {
            "dense_weights": lines * sizes["dense_tiles"] * job.dense_pitch,
            "dense_weight_scales": job.taps * sizes["dense_tiles"] * config.dense_steps,
            "sparse_weights": lines * own * job.sparse_pitch,
            "sparse_weight_scales": job.taps * own * config.sparse_steps}
        for name in depths:
            if not getattr(config, f"{name.split('_')[0]}_pes"):
                self.rows[name] = 0
        self.place = {name: (depths[name] - rows) if top else 0
                      for name, rows in self.rows.items()}
        self.fits = all(self.rows[name] <= depth for name, depth in depths.items())
        self.depths = depths
        words = config.tile_outputs * 64 // config.port_width
        first, self.bank = bank << (words - 1).bit_length(), bank
        self.job, self.own, self.sizes = job, own, sizes
        self.buffers = {name: {} for name in depths}
        if self.fits:
            self.buffers["table"] = {
                (first + n, 0): word for n, word in enumerate(job.table)}
            if config.dense_pes:
                self.dense()
            if config.sparse_pes:
                self.sparse()

    def beside(self, other):
        """Both jobs' weights fit."""
        return all(self.rows[name] + other.rows[name] <= depth
                   for name, depth in self.depths.items())

    def words(self):
        """Each (tap and plane, tap, position, outputs' codes) that is loaded."""
        for position, slot in enumerate(self.job.list):
            if slot != PADDING:
                for tap, planes in enumerate(self.job.weights[slot]):
                    for plane, line in enumerate(planes):
                        yield tap * self.job.planes + plane, position, line

    def dense(self):
        job, config = self.job, self.job.config
        lanes, vector, units = config.dense_lanes, config.vector, config.dense_scale_units
        tiles = self.sizes["dense_tiles"]
        for line, position, outputs in self.words():
            for tile in range(tiles if position < job.high else 0):
                row = (line * tiles + tile) * job.dense_pitch + position // vector
                place = self.place["dense_weights"] + row, position % vector
                self.buffers["dense_weights"][place] = nibbles(
                    outputs[tile * lanes:(tile + 1) * lanes])
        rows = tiles * config.dense_steps
        for tap, scales in enumerate(job.weight_scales):
            for row in range(rows):
                self.scale_row("dense", (self.place["dense_weight_scales"] + tap * rows + row,),
                               scales[row * units:(row + 1) * units])

    def sparse(self):
        job, config = self.job, self.job.config
        lanes, vector, units = config.sparse_lanes, config.vector, config.sparse_scale_units
        tiles, pes = self.sizes["sparse_tiles"], config.sparse_pes
        for tile in range(tiles):
            turns = min(tiles, pes)
            owners = [pe for pe in range(pes) if pe % turns == tile % turns]
            own = tile // pes
            outputs = range(tile * lanes, min((tile + 1) * lanes, job.output_words * vector))
            for pe in owners:
                for line, position, codes in self.words():
                    if position < job.low_used:
                        continue
                    row = ((line * self.own + own) * job.sparse_pitch
                           + position - job.sparse_first)
                    for first in outputs[::vector]:
                        place = (pe, self.place["sparse_weights"] + row,
                                 first % lanes // vector)
                        self.buffers["sparse_weights"][place] = nibbles(
                            codes[first:first + vector])
                for tap, scales in enumerate(job.weight_scales):
                    for first in outputs[::units]:
                        row = ((tap * self.own + own) * config.sparse_steps
                               + first % lanes // units)
                        self.scale_row(
                            "sparse", (pe, self.place["sparse_weight_scales"] + row),
                            scales[first:first + units])

    def scale_row(self, side, place, scales):
        size = self.job.config.port_width // 8
        data = [decoded_scale(code, self.job.mx) for code in scales]
        for column in range(ceil(len(data), size)):
            self.buffers[f"{side}_weight_scales"][*place, column] = sum(
                byte << 8 * n for n, byte in enumerate(data[column * size:(column + 1) * size]))


def layer_sizes(job):
    """Sizes that the sequencer derives for a job; see `hw.layer.layer_layout`."""
    config = job.config
    top, bottom = job.input_rows
    left, right = job.input_columns
    sparse_tiles = ceil(job.outputs, config.sparse_lanes)
    return {
        "plane": job.height * job.width, "mx": int(job.mx),
        "slot_words": job.slots // config.vector, "output_words": job.output_words,
        "chunks": ceil(job.outputs, config.quad),
        "dense_tiles": ceil(job.outputs, config.dense_lanes), "sparse_tiles": sparse_tiles,
        "sparse_own": max(1, sparse_tiles // max(1, config.sparse_pes)),
        "kernel3": int(job.kernel == 3), "taps": job.taps,
        "origin": job.y * job.width + job.x,
        "input_row": top, "input_last": bottom - 1, "input_column": left,
        "input_width": right - left,
    }


def layer_fields(job, fields):
    """The loader's ``layer`` for a job whose operands lie at ``fields``."""
    formats = (2, 2) if job.mx else (0, 1)
    return {
        **fields, **layer_sizes(job),
        "slot_pitch": job.taps * job.planes * fields["weight_pitch"],
        "format": formats[job.signed], "kernel": job.kernel, "height": job.height,
        "width": job.width, "channels": job.slots, "outputs": job.outputs, "tile_y": job.y,
        "tile_x": job.x, "tile_height": job.tile_height, "tile_width": job.tile_width,
        "share": job.share, "dense_limit": job.dense_limit,
        "keep_weights": int(job.keep_weights),
    }


def geometries(run, weights):
    """Fields of the geometry of both sides for a `Run` and the `Weights` that it uses."""
    job = run.job
    config, first = job.config, job.sparse_first
    left, right = job.input_columns
    sizes = layer_sizes(job)
    both = {
        "kernel3": int(job.kernel == 3), "mx": int(job.mx),
        "signed_codes": int(job.signed and not job.mx), "height": job.height, "width": job.width,
        "row": run.row, "column": job.x, "rows": run.rows, "columns": job.tile_width,
        "above": int(run.begin < run.row), "before": int(left < job.x), "in_width": right - left,
        "records": run.parity * config.record_depth // 2, "chunks": sizes["chunks"],
        "cut": job.cut}
    result = {
        "dense": {
            **both, "tiles": sizes["dense_tiles"], "pitch": job.dense_pitch,
            "low": job.words if job.mx else ceil(job.low, config.vector),
            "high": ceil(job.high, config.vector), "stride": max(1, job.share) if job.mx else 1},
        "sparse": {
            **both, "tiles": sizes["sparse_tiles"], "pitch": job.sparse_pitch,
            "high": job.high - first, "stride": 1, "skip": job.share if job.mx else 0}}
    active = ((job.share != 0, job.share != 1) if job.mx
              else (job.high > 0, job.low < job.n))
    for (side, geometry), work in zip(result.items(), active):
        geometry["weights"] = weights.place[f"{side}_weights"] % weights.depths[
            f"{side}_weights"]
        geometry["weight_scales"] = (
            weights.place[f"{side}_weight_scales"] % weights.depths[
                f"{side}_weight_scales"])
        geometry["active"] = int(work and getattr(config, f"{side}_pes") > 0)
    return {side: geometry if geometry["active"] else {"active": 0}
            for side, geometry in result.items()}


class Monitor:
    """What has been written to the activation buffers of a unit."""

    def __init__(self, dut):
        self.dut = dut
        self.buffers = {name: {} for name in PORTS}

    def look(self, ctx):
        for name in PORTS:
            port = getattr(self.dut, name)
            if ctx.get(port.enable):
                address = ctx.get(port.address)
                assert address not in self.buffers[name], f"{name} {address} written twice"
                self.buffers[name][address] = ctx.get(port.data)

    def take(self, config):
        """The writes since the last time, decoded as those of a `Run`."""
        from hw.job import entry_layout, record_layout      # the widths of fields only

        def decode(layout, value):
            return layout.from_bits(value)

        names = {"dense": ("start", "count", "scale")}
        names["sparse"] = (*names["dense"], "skip")
        result = {"dense_codes": self.buffers["dense_codes"]}
        for side in ("dense", "sparse"):
            layout = record_layout(config, side)
            result[f"{side}_records"] = {
                address: tuple(decode(layout, value)[name] for name in names[side])
                for address, value in self.buffers[f"{side}_records"].items()}
        layout = entry_layout(config)
        result["sparse_entries"] = {
            address: [(item.position, item.code) for item in decode(layout, value) if item.code]
            for address, value in self.buffers["sparse_entries"].items()}
        self.buffers = {name: {} for name in PORTS}
        return result
