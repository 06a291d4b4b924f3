// A counter and a memory behind it: the smallest design that needs what sim/verilator.py gives.
module counter #(parameter START = 0) (
    input clk, input rst,
    input [7:0] step, output reg [31:0] total,
    input write, input [9:0] address, input [31:0] write_data, output [31:0] read_data
);
  store store (.clk(clk), .write(write), .address(address), .write_data(write_data),
               .read_data(read_data));
  always @(posedge clk) total <= rst ? START : total + {24'd0, step};
endmodule

module store (clk, write, address, write_data, read_data);
  input clk, write;
  input [9:0] address;
  input [31:0] write_data;
  output reg [31:0] read_data;
  reg [31:0] words [0:1023];
  reg [9:0] last;
  always @(posedge clk) begin
    if (write) words[address] <= write_data;
    read_data <= words[address];
    last <= address;
  end
endmodule
