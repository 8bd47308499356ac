"""Turn images and a question into visual tokens for the LLM, with as few model calls as possible.

stage      does the steps for every image of a request, and waits for vision slots and LLM tokens
plan       decides which step comes next for one image; pure
"""

from service.vision_stage.stage import VisionStage, decoding_cost

__all__ = ["VisionStage", "decoding_cost"]
