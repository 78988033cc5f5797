"""The machine under the agents: joining a worker group, keeping the agents running, and powering off when abandoned."""
