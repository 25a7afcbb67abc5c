"""Executes the schedule's action lists: nothing here decides order, memory or communication.

run_actions(steps, handlers)          executor: one stage's list, step by step
PipelineStage(...)                    stage: the handlers of a rank, over its virtual stages' models
forward_steps, backward_steps         passes: one microbatch through the phases of one virtual stage
Recorder                              recorder: when each action ran, for a trace
"""
