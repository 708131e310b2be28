"""A reward of your own: python -m gadcore.run --algorithm.reward examples.my_reward:held_to_length

It gets one group (gadcore.train.reward.RewardInputs): its texts and D's scores. D is trained on its own loss all the
same.
"""


def held_to_length(inputs):
    """D's score, less one for every tenth that a sample is longer or shorter than the teacher's response."""
    teacher = max(len(inputs.teacher), 1)
    return [
        score - 10 * abs(len(text) - teacher) / teacher
        for text, score in zip(inputs.samples, inputs.scores, strict=True)
    ]
