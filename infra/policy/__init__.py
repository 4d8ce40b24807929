"""A Pulumi policy pack: the rules of `infra.checks` for Kubernetes resources that others wrote.

`pulumi preview --policy-pack infra/policy` runs it; each code is a policy, whose level a policy config file can set by the code.
"""
