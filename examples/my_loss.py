"""A policy loss of your own: python -m gadcore.run --algorithm.loss examples.my_loss:reinforce

It gets a micro-batch (gadcore.models.policy_loss.LossInputs) and returns its part of the batch's loss: a sum over
tokens, divided by the tokens of the whole batch, so that the parts add up whatever the cut.
"""


def reinforce(inputs):
    """REINFORCE with group advantages, and k3 KL to the reference policy where there is one."""
    loss = -inputs.token_advantages * inputs.logprob
    if inputs.ref_logprob is not None:
        log_ratio = inputs.ref_logprob - inputs.logprob
        loss = loss + inputs.algorithm.kl_coef * (log_ratio.exp() - log_ratio - 1)
    return loss.sum() / inputs.denominator
