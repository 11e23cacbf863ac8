"""Puts a plan into a training: a `Plan` comes in, hooks and step listeners decay, a `WeightDecay`
handle goes out.

It only reads plans, and knows nothing of classifiers, audits, commands or frameworks.
"""
