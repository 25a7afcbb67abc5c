"""From a config to its program: layout, action lists, proof and costs, compiled once and read by
everybody.

    program = compile_program(config)     layout and training's lists; ConfigError where there are
                                          none
    layout = program_layout(config)       the layout alone, cut for the same placement
    program.report                        the proof of training's lists
    program.messages                      what all lists ask of the channels between stages
    program.evaluation(n)                 evaluation's lists for n microbatches, proved
    program.costs                         what the simulator takes, made when first asked for
    program.fingerprint                   the same on every rank, or the ranks run different
                                          programs

Training, `plan`, the rehearsal and the check of host memory read this one object; ranks that are
threads share it. Without torch, like the rooms it is made from.
"""

from k2train.program.compile import check_program, compile_program, program_layout
from k2train.program.program import Program

__all__ = ["Program", "check_program", "compile_program", "program_layout"]
