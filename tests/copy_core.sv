// A stand-in for the core: copies register 4's 16 words from word 0 to word 64, and can misbehave.
//
// Register 5 chooses how: 0 not at all, else one more than the number of the violation that the
// bench must see; 10 never ends. Register 8 counts cycles, register 7 the reads of register 7.

module sqdm_core #(
    parameter int unsigned PORT_WIDTH = 64,
    parameter int unsigned ADDRESS_WIDTH = 10
) (
    input  logic                     clk,
    input  logic                     rst,
    input  logic [4:0]               csr_address,
    input  logic                     csr_write,
    input  logic [31:0]              csr_write_data,
    input  logic                     csr_read,
    output logic [31:0]              csr_read_data,
    output logic                     interrupt,
    output logic                     memory__read_request__valid,
    input  logic                     memory__read_request__ready,
    output logic [ADDRESS_WIDTH-1:0] memory__read_request__payload,
    input  logic                     memory__read_response__valid,
    output logic                     memory__read_response__ready,
    input  logic [PORT_WIDTH-1:0]    memory__read_response__payload,
    output logic                     memory__write_request__valid,
    input  logic                     memory__write_request__ready,
    output logic [PORT_WIDTH/8+PORT_WIDTH+ADDRESS_WIDTH-1:0] memory__write_request__payload,
    input  logic                     memory__write_response__valid
);
    localparam int unsigned COUNT = 16;

    logic [31:0] fault, cycles, touched;
    logic [5:0]  asked, taken, answered;
    logic        busy;
    logic        late;                    // a request after the end
    logic [ADDRESS_WIDTH-1:0] from, to;
    logic [PORT_WIDTH/8-1:0]  strobe;

    // word 15 gets its even bytes only
    assign strobe = taken == 15 ? {PORT_WIDTH/16{2'b01}} : '1;
    always_comb begin
        from = ADDRESS_WIDTH'(asked);
        to = ADDRESS_WIDTH'(64) + ADDRESS_WIDTH'(taken);
        if (fault == 1 && cycles[0]) from = ADDRESS_WIDTH'(asked ^ 1);
        if (fault == 3 && asked == 7) from = {1'b1, {ADDRESS_WIDTH-1{1'b0}}};
        if (fault == 4 && taken == 7) to = {1'b1, {ADDRESS_WIDTH-1{1'b0}}};
        if (fault == 5 && asked == 7) from = ADDRESS_WIDTH'(COUNT);
        if (fault == 6 && taken == 7) to = ADDRESS_WIDTH'(63);
    end
    assign memory__read_request__valid = late || (busy && asked != COUNT);
    assign memory__read_request__payload = from;
    assign memory__write_request__valid = busy && memory__read_response__valid && taken != COUNT
        && !(fault == 2 && cycles[0]);
    assign memory__write_request__payload = {strobe, memory__read_response__payload, to};
    assign memory__read_response__ready =
        memory__write_request__valid && memory__write_request__ready;

    always_ff @(posedge clk) begin
        late <= 0;
        if (csr_write && csr_address == 5) fault <= csr_write_data;
        if (csr_read) begin
            csr_read_data <= 0;
            if (csr_address == 3) csr_read_data <= {30'b0, interrupt, busy};
            if (csr_address == 8) csr_read_data <= cycles;
            if (csr_address == 7) begin
                csr_read_data <= touched;
                touched <= touched + 1;
            end
        end
        if (busy) begin
            cycles <= cycles + 1;
            if (memory__read_request__valid && memory__read_request__ready) asked <= asked + 1;
            if (memory__read_response__valid && memory__read_response__ready) taken <= taken + 1;
            if (memory__write_response__valid) answered <= answered + 1;
            if (answered == COUNT && fault != 10) begin
                busy <= 0;
                interrupt <= 1;
                late <= fault == 7;
            end
            if ((fault == 8 && asked == 8) || (fault == 9 && taken == COUNT)) begin
                busy <= 0;
                interrupt <= 1;
            end
        end
        if (csr_write && csr_address == 2 && csr_write_data[0]) begin
            busy <= 1;
            interrupt <= 0;
            {asked, taken, answered} <= 0;
            cycles <= 0;
        end
        if (csr_write && csr_address == 6) touched <= csr_write_data;
        if (rst) begin
            busy <= 0;
            interrupt <= 0;
            fault <= 0;
        end
    end
endmodule
