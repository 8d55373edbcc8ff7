"""latentrt, as its README shows it."""

from protocol import serve


def load(settings):
    """Load the engine with room for the largest batch."""
    from latentrt import Engine
    from latentrt.request import Request

    engine = Engine.load(settings["model"], threads=settings["threads"], lanes=2 * settings["batch"])

    def draw(task):
        width, height = task["size"]
        common = {"steps": task["steps"], "guidance": task["guidance"], "solver": task["solver"]}
        pairs = zip(task["prompts"], task["seeds"])  # noqa: B905
        requests = [Request(prompt=prompt, seed=seed, width=width, height=height, **common) for prompt, seed in pairs]
        jobs = [job for request in requests for job in engine.jobs(request)]
        engine.run(jobs)
        return [engine.picture(job) for job in jobs]

    return draw


serve(load)
