// The bench around a core: its memory, and a watch over what the core does at its ports.
//
// Memory is read and written one port word a cycle on each channel, or less often where a stall
// input asks for it. The host fills memory from "load.bin" and reads it back through "dump.bin",
// both in the simulator's working directory and in no simulated time, so that a bench never moves
// data word by word. File words are big-endian.
//
// A load file is any number of {first word (32 bits), number of words (32 bits), words...}.

module bench #(
    parameter int unsigned VECTOR = 16,         // port words are 4 * VECTOR bits wide
    parameter int unsigned ADDRESS_WIDTH = 22,  // bits of a word address
    parameter int unsigned MEMORY_WIDTH = 22,   // 2 to this power words exist
    localparam int unsigned PORT_WIDTH = 4 * VECTOR
) (
    input  logic        clk,
    input  logic        rst,

    // the core's registers, a cycle late; data appears two cycles after `csr_read`
    input  logic [4:0]  csr_address,
    input  logic        csr_write,
    input  logic [31:0] csr_write_data,
    input  logic        csr_read,
    output logic [31:0] csr_read_data,
    output logic        interrupt,

    // how memory behaves; a stall of n holds the channel back in n of 256 cycles
    input  logic [7:0]  read_latency,      // cycles from request to response, at least 1
    input  logic [7:0]  write_latency,     // cycles from request to response, at least 1
    input  logic [7:0]  read_stall,        // requests not ready
    input  logic [7:0]  response_stall,    // responses not valid
    input  logic [7:0]  write_stall,       // requests not ready
    input  logic [7:0]  answer_stall,      // write responses not valid
    input  logic [31:0] seed,              // of the stalls, not 0; taken over by `clear`

    input  logic [31:0] memory_first,      // address of the first word that exists

    // what the pass may do; everything else is a violation
    input  logic [31:0] descriptor,        // word address of the chain of descriptors
    input  logic [31:0] descriptor_words,  // and its port words
    input  logic [31:0] read_base,
    input  logic [31:0] read_limit,
    input  logic [31:0] write_base,
    input  logic [31:0] write_limit,

    // strobes of the host
    input  logic        load,              // take over "load.bin"
    input  logic        dump,              // write words to "dump.bin"
    input  logic [31:0] dump_first,
    input  logic [31:0] dump_count,
    input  logic        clear,             // counters and violations to zero, stalls from `seed`

    // what was seen since `clear`
    output logic [31:0] reads,             // words
    output logic [31:0] writes,            // words
    output logic [8:0]  violations         // see sim/layer_bench.py
);
    localparam int unsigned STROBE_WIDTH = PORT_WIDTH / 8;
    localparam int unsigned DEPTH = 256;   // transfers in flight on a channel
    localparam int unsigned POINTER = $clog2(DEPTH);

    typedef struct packed {
        logic [STROBE_WIDTH-1:0]  strobe;
        logic [PORT_WIDTH-1:0]    data;
        logic [ADDRESS_WIDTH-1:0] address;
    } write_t;

    // The simulator evaluates whatever depends on an input without a register in between at every
    // change of any input, clock included: half the speed. So the core's inputs are registers.
    logic        reset;
    logic [4:0]  address;
    logic        write;
    logic [31:0] write_data;
    logic        read;

    always_ff @(posedge clk) begin
        reset <= rst;
        address <= csr_address;
        write <= csr_write;
        write_data <= csr_write_data;
        read <= csr_read;
    end

    logic                     read_request_valid;
    logic                     read_request_ready;
    logic [ADDRESS_WIDTH-1:0] read_request;
    logic                     read_response_valid;
    logic                     read_response_ready;
    logic [PORT_WIDTH-1:0]    read_response;
    logic                     write_request_valid;
    logic                     write_request_ready;
    write_t                   write_request;
    logic                     write_response_valid;

    sqdm_core core (
        .clk,
        .rst(reset),
        .csr_address(address),
        .csr_write(write),
        .csr_write_data(write_data),
        .csr_read(read),
        .csr_read_data,
        .interrupt,
        .memory__read_request__valid(read_request_valid),
        .memory__read_request__ready(read_request_ready),
        .memory__read_request__payload(read_request),
        .memory__read_response__valid(read_response_valid),
        .memory__read_response__ready(read_response_ready),
        .memory__read_response__payload(read_response),
        .memory__write_request__valid(write_request_valid),
        .memory__write_request__ready(write_request_ready),
        .memory__write_request__payload(write_request),
        .memory__write_response__valid(write_response_valid)
    );

    logic [PORT_WIDTH-1:0] words [2**MEMORY_WIDTH];

    function automatic logic [MEMORY_WIDTH-1:0] place(logic [31:0] at);
        return MEMORY_WIDTH'(at - memory_first);
    endfunction

    function automatic logic exists(logic [31:0] at);
        return (at - memory_first) >> MEMORY_WIDTH == 0;
    endfunction

    // stalls: four bytes of a xorshift generator decide about the four channels
    logic [31:0] random;
    logic [31:0] now;

    always_ff @(posedge clk) begin
        logic [31:0] next;
        next = random ^ (random << 13);
        next = next ^ (next >> 17);
        next = next ^ (next << 5);
        random <= reset || clear ? seed : next;
        now <= reset ? 0 : now + 1;
    end

    // reads: responses wait in a queue until they are due
    logic [PORT_WIDTH-1:0] waiting [DEPTH];
    logic [31:0]           due     [DEPTH];
    logic [POINTER-1:0]    first;          // oldest response that waits
    logic [POINTER-1:0]    free;           // next empty place

    always_ff @(posedge clk) begin
        logic [POINTER-1:0] f;
        logic [POINTER-1:0] n;
        f = first;
        n = free;
        if (read_request_valid && read_request_ready) begin
            waiting[n] = words[place(32'(read_request))];
            due[n] = now + {24'b0, read_latency};
            n++;
        end
        if (!read_response_valid || read_response_ready) begin
            read_response_valid <= 0;
            if (f != n && $signed(now + 1 - due[f]) >= 0 && random[7:0] >= response_stall) begin
                read_response_valid <= 1;
                read_response <= waiting[f];
                f++;
            end
        end
        read_request_ready <= POINTER'(n + 1) != f && random[15:8] >= read_stall;
        first <= f;
        free <= n;
        if (reset) begin
            first <= 0;
            free <= 0;
            read_request_ready <= 0;
            read_response_valid <= 0;
        end
    end

    // writes: memory changes at once, the response follows when it is due
    logic [31:0]        answer_due [DEPTH];
    logic [POINTER-1:0] answer_first;
    logic [POINTER-1:0] answer_free;

    always_ff @(posedge clk) begin
        logic [POINTER-1:0] f;
        logic [POINTER-1:0] n;
        f = answer_first;
        n = answer_free;
        if (load) load_words();
        if (write_request_valid && write_request_ready) begin
            if (exists(32'(write_request.address))) begin
                for (int unsigned i = 0; i < STROBE_WIDTH; i++) begin
                    if (write_request.strobe[i]) begin
                        words[place(32'(write_request.address))][8*i+:8]
                            = write_request.data[8*i+:8];
                    end
                end
            end
            answer_due[n] = now + {24'b0, write_latency};
            n++;
        end
        write_response_valid <= 0;
        if (f != n && $signed(now + 1 - answer_due[f]) >= 0 && random[23:16] >= answer_stall) begin
            write_response_valid <= 1;
            f++;
        end
        write_request_ready <= POINTER'(n + 1) != f && random[31:24] >= write_stall;
        answer_first <= f;
        answer_free <= n;
        if (reset) begin
            answer_first <= 0;
            answer_free <= 0;
            write_request_ready <= 0;
            write_response_valid <= 0;
        end
    end

    task automatic load_words;
        int file;
        int got;
        logic [63:0] header;
        file = $fopen("load.bin", "rb");
        if (file == 0) $fatal(1, "load.bin cannot be opened");
        while ($fread(header, file) == 8) begin
            if (!exists(header[63:32]) || !exists(header[63:32] + header[31:0] - 1)) begin
                $fatal(1, "load.bin goes beyond the memory");
            end
            got = $fread(words, file, 32'(place(header[63:32])), header[31:0]);
            if (got != int'(header[31:0] * STROBE_WIDTH)) $fatal(1, "load.bin ends too early");
        end
        $fclose(file);
    endtask

    always_ff @(posedge clk) begin
        int file;
        if (dump) begin
            file = $fopen("dump.bin", "wb");
            if (file == 0) $fatal(1, "dump.bin cannot be opened");
            for (logic [31:0] i = 0; i < dump_count; i++) begin
                $fwrite(file, "%u", words[place(dump_first + i)]);
            end
            $fclose(file);
        end
    end

    // the watch
    logic                     read_held;
    logic [ADDRESS_WIDTH-1:0] read_seen;
    logic                     write_held;
    write_t                   write_seen;
    logic                     was_done;

    always_ff @(posedge clk) begin
        logic reading;
        logic writing;
        reading = read_request_valid && read_request_ready;
        writing = write_request_valid && write_request_ready;
        read_held <= read_request_valid && !read_request_ready;
        read_seen <= read_request;
        write_held <= write_request_valid && !write_request_ready;
        write_seen <= write_request;
        was_done <= interrupt;
        if (reading) reads <= reads + 1;
        if (writing) writes <= writes + 1;
        if (read_held && (!read_request_valid || read_request != read_seen)) violations[0] <= 1;
        if (write_held && (!write_request_valid || write_request != write_seen)) violations[1] <= 1;
        if (reading && !exists(32'(read_request))) violations[2] <= 1;
        if (writing && !exists(32'(write_request.address))) violations[3] <= 1;
        if (reading && !(32'(read_request) >= read_base && 32'(read_request) < read_limit)
            && 32'(read_request) - descriptor >= descriptor_words) violations[4] <= 1;
        if (writing && !(32'(write_request.address) >= write_base
            && 32'(write_request.address) < write_limit)) violations[5] <= 1;
        if (interrupt && (read_request_valid || write_request_valid)) violations[6] <= 1;
        if (interrupt && !was_done && (first != free || read_response_valid)) violations[7] <= 1;
        if (interrupt && !was_done && answer_first != answer_free) violations[8] <= 1;
        if (reset || clear) begin
            reads <= 0;
            writes <= 0;
            violations <= 0;
        end
        if (reset) begin
            read_held <= 0;
            write_held <= 0;
            was_done <= 0;
        end
    end
endmodule
