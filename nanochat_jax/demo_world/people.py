"""Texts about people: portraits, introductions, comparisons, conversations, letters, diary pages."""

from __future__ import annotations

from functools import cache

from nanochat_jax.demo_world.draw import Draw, side
from nanochat_jax.demo_world.general import DAYS
from nanochat_jax.demo_world.lexicon import FRUITS, PLACES, THINGS
from nanochat_jax.demo_world.relations import PERSON, ask, short_answer, state, state_first_person
from nanochat_jax.demo_world.template import article, capital, fill
from nanochat_jax.demo_world.world import Fact, Person, World, lookup

_RELATIONS = tuple(PERSON)


@cache
def person_fields(world: World, name: str, tag: str = "") -> dict[str, str]:
    """The fields of one person for templates; with `tag` "2" they are called hero2, he2, ..."""
    p = world.person(name)
    town = world.town(p.home)
    out = {
        "hero": p.name, "he": p.pronoun, "He": capital(p.pronoun), "him": p.him, "his": p.his, "His": capital(p.his),
        "self": "herself" if p.pronoun == "she" else "himself", "job": p.job, "town": p.home, "region": town.region,
        "river": town.river, "hill": town.hill, "known": town.known_for, "food": p.food,
        "mark": "the " + town.landmark.split(" ", 1)[1],
        "color": p.color, "beast": p.animal, "hobby": p.hobby, "kind": p.pet_kind, "pet": p.pet_name,
        "market": town.market_day,
    }  # fmt: skip
    return {key + tag: value for key, value in out.items()}


@cache
def pair_fields(world: World, name: str) -> dict[str, str]:
    """The fields of a person and, with tag 2, of that person's best friend."""
    return person_fields(world, name) | person_fields(world, world.person(name).friend, "2")


def fact_of(world: World, name: str, relation: str) -> Fact:
    """The fact that `world` has about `name` and `relation`; KeyError where there is none."""
    return Fact(name, relation, lookup(world, name, relation))


def _chosen(world: World, draw: Draw, kind: str, low: int, high: int) -> tuple[Person, list[str]]:
    """A person and some relations in an order that belongs to this split."""
    while True:
        person = draw.pick(world.people)
        relations = draw.some(_RELATIONS, draw.between(low, high))
        if "pet_name" in relations:  # the name of a pet makes sense only behind the pet
            relations.remove("pet_name")
            if "pet" not in relations:
                relations.append("pet")
            relations.insert(relations.index("pet") + 1, "pet_name")
        if side(kind, person.name, *relations) == draw.split:
            return person, relations


def portrait(world: World, draw: Draw) -> str:
    """One paragraph about one person, in the third person."""
    person, relations = _chosen(world, draw, "portrait", 4, 8)
    out = []
    named = True
    for relation in relations:
        out.append(state(fact_of(world, person.name, relation), draw, None if named else person.pronoun))
        named = relation == "friend" or draw.chance(0.12)  # behind a friend's name "she" would be the friend
        if relation == "job" and not person.is_child and draw.chance(0.7):
            job, he = world.job(person.job), capital(person.pronoun)
            out.append(draw.pick((f"{he} {job.work}.", f"{he} works {job.workplace}.")))
        elif relation == "home" and draw.chance(0.4):
            out.append(state(fact_of(world, person.home, draw.pick(("region", "river", "known_for"))), draw))
        elif relation == "friend" and draw.chance(0.5):
            other = draw.pick(("favorite_color", "favorite_food", "hobby", "age", "pet"))
            out.append(state(fact_of(world, person.friend, other), draw))
    return " ".join(out)


def introduction(world: World, draw: Draw) -> str:
    """A person introduces herself or himself."""
    person, relations = _chosen(world, draw, "introduction", 4, 8)
    hello = draw.pick(("Hello!", "Good morning!", "Hello, everyone.", "Good day.", "Welcome!"))
    out = [f"{hello} My name is {person.name}."]
    for relation in relations:
        out.append(state_first_person(fact_of(world, person.name, relation), draw))
        if relation == "friend" and draw.chance(0.5):
            out.append(f"We like to spend the {draw.pick(('day', 'afternoon', 'evening'))} together.")
    out.append(draw.pick(("", "It is nice to meet you.", "I am glad that you are here.", "And who are you?")))
    return " ".join(out).strip()


def comparison(world: World, draw: Draw) -> str:
    """Two people side by side."""
    while True:
        a, b = draw.some(world.people, 2)
        relations = draw.some(
            ("age", "job", "home", "favorite_food", "favorite_color", "favorite_animal", "hobby", "pet"), 4
        )
        if side("comparison", a.name, b.name, *relations) == draw.split:
            break
    out = [draw.pick((f"{a.name} and {b.name} are two people of our world.", f"Let us compare {a.name} and {b.name}.",
                      f"How are {a.name} and {b.name} different?"))]  # fmt: skip
    for relation in relations:
        one, two = lookup(world, a.name, relation), lookup(world, b.name, relation)
        if one == two and relation != "age":
            both = {
                "job": f"Both are {one}s.", "home": f"Both live in {one}.", "favorite_food": f"Both love {one}.",
                "favorite_color": f"Both like the color {one} best.", "favorite_animal": f"Both like the {one} best.",
                "hobby": f"Both enjoy {one}.", "pet": f"Each of them has {article(one)}.",
            }  # fmt: skip
            out.append(both[relation])
        elif relation == "age" and a.age != b.age:
            old, young = (a, b) if a.age > b.age else (b, a)
            ages = [lookup(world, p.name, "age") for p in (old, young)]
            older = f"so {old.name} is older than {young.name}."
            out.append(f"{old.name} is {ages[0]} and {young.name} is {ages[1]}, {older}")
        elif relation == "age":
            out.append(f"{a.name} and {b.name} are both {one} years old.")
        else:
            first = state(fact_of(world, a.name, relation), draw)[:-1]
            second = state(fact_of(world, b.name, relation), draw)
            second = second if second.startswith(b.name) else second[:1].lower() + second[1:]
            out.append(f"{first}, {draw.pick(('but', 'and'))} {second}")
    return " ".join(out)


_GOODBYES = (
    "They talked until it was dark.",
    "Then they walked home together.",
    "They shook hands and smiled.",
    "From that day on they were friends.",
    "They said goodbye and waved.",
)


def conversation(world: World, draw: Draw) -> str:
    """Two people who do not know each other well ask and answer."""
    while True:
        a, b = draw.some(world.people, 2)
        relations = draw.some(
            ("age", "job", "home", "favorite_food", "favorite_color", "favorite_animal", "hobby", "friend"), 3
        )
        if a.friend != b.name and side("conversation", a.name, b.name, *relations) == draw.split:
            break
    place = draw.pick(PLACES)[1]
    questions = {
        "age": "How old are you?", "job": "What do you do?", "home": "Where do you live?",
        "favorite_food": "What do you like to eat?", "favorite_color": "What is your favorite color?",
        "favorite_animal": "Which animal do you like best?", "hobby": "What do you enjoy?",
        "friend": "Who is your best friend?",
    }  # fmt: skip
    out = [f"{a.name} met {b.name} {place}."]
    for i, relation in enumerate(relations):
        answer = state_first_person(fact_of(world, b.name, relation), draw)[:-1]
        question = questions[relation]
        lead = "Hello! " if i == 0 else draw.pick(("", "And ", "Tell me, "))
        if lead in ("And ", "Tell me, "):
            question = question[:1].lower() + question[1:]
        back = f'"{answer}," {draw.pick(("said", "answered"))} {b.name}.'
        out.append(f'"{lead}{question}" asked {a.name}. {back}')
        if draw.chance(0.5):
            mine = state_first_person(fact_of(world, a.name, relation), draw)[:-1]
            same = lookup(world, a.name, relation) == lookup(world, b.name, relation)
            out.append(f'"{"It is the same with me. " if same else ""}{mine}," said {a.name}.')
    out.append(draw.pick(_GOODBYES))
    return "\n".join(out)


_LETTER = """Dear {hero2},¶ [thank you for your [kind |long |funny |]letter.|how are you today?|I hope that you are
well.] [I am well|We are all well here|All is well]. [Yesterday|On {day}|Last week] I was {at} with {pet}, my
{kind}. [We found {a thing} there and brought it to its owner.|{pet} found {a thing} and did not want to give it
back!|I saw a picture of {a beast2} there, and I thought of you, because it is your favorite animal.|It rained, and
we got very wet, but we laughed all the way home.|I sat in the sun and read until lunch.] [Now I am learning
something new every day.|I still like {hobby} best.|In the evening I was [tired|sleepy] but happy.] [Will you visit
me on {day2}?|Can you come on {day2}?|Please come and see me soon.] [We can eat {food2}, because I know that you
love it.|I will make {food2} for you.|We can eat {food} together.] [Please bring {pet2} too.|Say hello to {pet2}.|]¶
[Your friend,|Many greetings from|With love,] {hero}"""


def letter(world: World, draw: Draw) -> str:
    """A letter from a person to that person's best friend."""
    person, place, thing = draw.combination("letter", world.people, PLACES, THINGS)
    day, day2 = draw.some(DAYS, 2)
    fields = pair_fields(world, person.name) | {"at": place[1], "thing": thing, "day": day, "day2": day2}
    return fill(_LETTER, draw, fields)


_DIARY = """{day}. [Dear diary, today|Today] [it rained all morning|the sun was shining|the wind was strong|it was
warm and quiet|the air was cold and clear]. [I got up early and|After breakfast I|I put on my {color} coat and] went
to {place} with [{hero2}|my friend {hero2}]. [We looked for {fruit} and found a whole basket of them.|We found {a
thing} and asked everyone whose it was.|{hero2} told me a story about {a beast2}, and I laughed a lot.|We built a
small house of branches and leaves.|{pet} came with us and ran ahead the whole way.] [At noon|Then|Later] [we ate
{food2}, which {hero2} loves|we ate {food}, my favorite food|we shared {a2} and a cup of tea]. [In the
afternoon|After that] I [spent an hour {hobby}|fed {pet} and tidied my room|helped a neighbor carry wood|wrote a
letter]. [Now I am tired, and {pet} is asleep [beside me|at my feet].|It was a good day.|Tomorrow I want to go there
again.|I will sleep well tonight.]"""


def diary(world: World, draw: Draw) -> str:
    """A page of someone's diary."""
    person, place, thing, day = draw.combination("diary", world.people, PLACES, THINGS, DAYS)
    fields = pair_fields(world, person.name) | {
        "place": place[0], "thing": thing, "day": day, "fruit": draw.pick(FRUITS), "a2": "a pear",
    }  # fmt: skip
    return fill(_DIARY, draw, fields)


def person_quiz(world: World, draw: Draw) -> str:
    """Questions and answers about one or two people."""
    while True:
        people = draw.some(world.people, draw.pick((1, 2, 2)))
        picks = [(p.name, r) for p in people for r in draw.some(_RELATIONS, 4 if len(people) == 1 else 3)]
        if side("person quiz", *picks) == draw.split:
            break
    out = []
    for name, relation in picks:
        fact = fact_of(world, name, relation)
        answer = capital(short_answer(fact, draw)) + "." if draw.chance(0.3) else state(fact, draw)
        out.append(f"{ask(fact, draw)} {answer}")
    return "\n".join(out)
