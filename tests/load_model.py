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
        return [[self.rng.randrange(256) for _ in range(self.output_words * self.config.vector)]
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
