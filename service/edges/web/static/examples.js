// Scenes of the reference model's world that its training never saw, and questions that it answers right.

export const EXAMPLES = [
  {
    file: "new_003.webp",
    alt: "A blue ring, a cyan triangle with 5, a blue square with x and a pink square with 8",
    questions: [
      "what character is on the pink square?",
      "how many objects are there?",
      "is the pink square below the blue square?",
      "describe the image.",
    ],
  },
  {
    file: "new_250.webp",
    alt: "Two crosses, an orange triangle with 2, a red star with 9, a cyan ring and a green circle with p",
    questions: [
      "how many crosses are in the image?",
      "is the green circle below the yellow cross?",
      "read the red star.",
      "do you see a medium red triangle?",
    ],
  },
  {
    file: "new_020.webp",
    alt: "A purple star with 6, a red triangle with p, a cyan star and a pink star with u",
    questions: [
      "is the red triangle left or right of the purple star?",
      "what is the shape of the large purple object?",
      "read the medium triangle.",
    ],
  },
  {
    file: "new_100.webp",
    alt: "A pink ring, circle and star, an orange triangle, a red star, a purple ring and a blue circle",
    questions: ["what is the shape of the orange object?", "what color is the small ring?", "is there a star?"],
  },
  {
    file: "new_042.webp",
    alt: "A pink star with 7, a small and a large cyan square and a purple ring",
    questions: ["is the small square above the large square?", "what shape is the pink object?", "read the pink star."],
  },
  {
    file: "small_print_002.webp",
    alt: "Small characters on small shapes, 448 pixels wide: 8 on a yellow cross, L on a yellow triangle, and a yellow ring",
    detail: "high", // the service answers these right with it
    hint: "These characters are too small for detail low. Compare it with detail high, below.",
    questions: [
      "which character is on the small cross?",
      "which character is on the small triangle?",
      "what is the shape of the medium yellow object?",
    ],
  },
];
