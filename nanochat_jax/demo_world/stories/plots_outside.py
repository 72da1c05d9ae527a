"""Plots that happen outside: on the hill, by the river, in the woods, in wind and snow."""

from nanochat_jax.demo_world.stories.plot import Plot

PLOTS = (
    Plot(
        "kite in the tree",
        ("tree", "animal helper", "color"),
        """It was a windy day, and {hero} [climbed|went] up {hill} with {his} {shade} kite. The kite [rose higher and
        higher|danced in the sky]. Then the wind [turned|grew wild], the string broke, and the kite [got
        caught|landed] in {a tree} tree. {hero} jumped, but {he} could not reach it. [{He} threw a stick, but the
        stick got stuck too.|{He} shook the tree, but only leaves came down.] "[What can we do|Can you help me],
        {hero2}?" {he} asked. {hero2} had no ladder. Just then a {helper} [looked out of the leaves|came along]. It
        [climbed|went] up to the kite, [bit through the string|gave it a push], and the kite [fell softly into the
        grass|came sailing down]. "Thank you, {helper}!" [called|shouted] {hero}. {He} [gave it a piece of bread from
        {his} pocket|left some seeds under the tree]. Then {hero} and {hero2} [mended the string|tied a new string]
        and let the {shade} kite fly until [the sun went down|evening].""",
    ),
    Plot(
        "picnic in the rain",
        ("open place", "fruit"),
        """{hero} and {hero2} wanted to have a picnic. They packed {food}, [some|a bag of] {fruit} and a bottle of
        [juice|water], and walked to {place}. [The sun was shining and the birds sang.|There was not a cloud in the
        sky.] But as soon as they sat down, [it began to rain|a dark cloud came, and it rained]. "[Our picnic is
        ruined|Now everything will be wet]!" said {hero}. They [ran as fast as they could|quickly took the basket]
        and found an old [barn|shed]. It was dry inside and smelled of hay. {hero2} put the blanket on the floor and
        said, "[Here is a good place|A picnic needs only a blanket and a friend]." So they ate the {fruit} and
        [listened to the rain on the roof|told each other funny stories]. When the rain was over, there was a
        [great|bright] rainbow over {town}. "[We would have missed it at home|Without rain there is no rainbow],"
        said {hero}, and {hero2} [agreed|nodded].""",
    ),
    Plot(
        "the baby animal",
        ("open place", "baby"),
        """%DAY% {hero} walked to {place} with {hero2}. [Suddenly|There] they heard a [thin|soft|sad] cry. In the
        [tall|high] grass sat a tiny {young}. It was all alone and [shook with fear|looked very sad]. "[It has lost
        its mother|Where is your mother]," said {hero}. "[We must help it|Let us find her]," said {hero2}. They knew
        that {a parent} lives in {den}, so that was where they looked first. {hero} carried the {young} [in {his}
        {color} scarf|in {his} arms], and it [grew quiet|stopped shaking]. After a long walk they [came to the right
        place|saw something move]. It was the mother! The {parent} looked at the children [for a moment|with big
        eyes], then it [ran to its young|came closer]. {hero} put the {young} down [gently|very slowly] and stepped
        back. [Soon both were gone.|The {young} turned around one last time.] "[I will miss it|I wanted to keep it],"
        said {hero}, "but [it belongs with its mother|now it is happy]." """,
    ),
    Plot(
        "the dry garden",
        ("vegetable", "flower"),
        """In spring {hero} planted {vegetable} and {flower} behind the house. Every day {he} looked at the brown
        earth, but nothing [grew|happened]. [It was a dry year, and no rain came.|The sun was hot, and the ground was
        hard as stone.] "[The seeds are thirsty|Plants need water]," said {hero2}. So {hero} took a bucket and went
        to the river {river}, [every morning and every evening|twice a day]. [{pet} always came along.|It was a long
        way, and the bucket was heavy.] After [one week|ten days] {he} saw a tiny green leaf. "[They are
        growing|Look]!" {he} [called|shouted]. In summer the garden was full of {flower}, and in autumn there were so
        many {vegetable} that {hero} [could give some to every neighbor|filled nine baskets]. "[How did you do
        it|What is your secret]?" the people asked. {hero} [laughed|smiled] and said, "[A little water every day|I
        only carried water and waited]." """,
    ),
    Plot(
        "the race",
        ("prize", "rival"),
        """Every [summer|spring] there is a great race in {town}, from {mark} to the top of {hill}. {hero} had
        [practiced for weeks|dreamed of it all year]. The prize was {a prize}. "Ready, set, go!" [The children
        ran.|And off they went.] {hero} was [fast|quick as the wind], and only {rival} was faster. But near the top,
        {rival} fell over a root and [cried out|held {hisr} foot]. Now {hero} could win! {He} [looked at the flag|saw
        the top of the hill] and then at {rival}. {He} stopped. "[Lean on me|Take my hand]," {he} said. They walked
        to the top together, and [all the others ran past|they were the very last]. The people [clapped all the
        same|were quiet at first, then they cheered]. "[You gave away the prize|You could have won]," said {rival}.
        "[I won a friend|There will be another race]," said {hero}. And the next day [{rival} came with {food} for
        {him}|they shared some {food}].""",
    ),
    Plot(
        "the treasure map",
        ("hidden", "place", "thing"),
        """{hero} found an old map in a book. [There was a red cross on it.|Someone had drawn a red cross on it.]
        "[It shows a treasure|A treasure]!" said {hero2}. "Let us look for it!" First they went to {place}, as the
        map said. [Then|From there] they took [thirty|forty|fifty] steps toward the river {river}. There stood a
        [tall|crooked] tree, and under it lay a [flat|round] stone. Together they pushed it away and dug in the
        ground. [{pet} helped with the digging.|It was hard work.] At last they found a small box. {hero} opened it
        with [shaking|careful] hands. There was no gold in it, but {hidden} and a letter. "[To the one who finds this
        box|You who found this]," it said, "[the true treasure is the friend who came with you|you have good eyes and
        a brave heart]." {hero} and {hero2} looked at each other and laughed. They put {a thing} into the box, wrote
        a new letter, and [hid it again for the next child|buried it again under the stone].""",
    ),
    Plot(
        "lost in the fog",
        ("neighbor", "sound"),
        """{hero} and {pet} were out {picking} when the fog came. [Soon everything was white.|It was so thick that
        {he} could not see {his} own feet.] "[Which way is home|Where are we], {pet}?" asked {hero}. {He} [walked to
        the left and then to the right|went in a circle], but every tree looked the same. {He} [wanted to cry, but
        {he} did not|sat down and tried to be brave]. "[First I must listen|Think, {hero}]," {he} said. {He} was very
        still. Far away {he} heard {sound}. "[That is in {town}|That can only be in {town}]!" {hero} [walked toward
        the sound, step by step|followed the sound and held {pet} close]. The sound became louder, and at last {he}
        saw a light. It was {hero3} the {job3} with a lantern. "[We have been looking for you|There you are]!" said
        {hero3}. At home they all ate {food}, and {hero} told everyone [how {he} had found the way with {his}
        ears|about the fog].""",
    ),
    Plot(
        "the snowman",
        ("nose", "thing", "color"),
        """In the night it had snowed, and all of {town} was white. {hero} [put on {his} warm coat|ran outside
        without breakfast] and called {hero2}. "[Let us build a snowman|We will make the biggest snowman of all]!"
        They [rolled three big balls of snow|worked until their fingers were cold]. For the eyes they took [two
        stones|coal], but they had no nose. They tried {nose1}, but it [fell off|looked silly]. Then {pet} came with
        {nose2}. [It was just right!|That was perfect!] "[Clever {kind}|Well done, {pet}]!" said {hero}. They gave
        the snowman {a shade} {thing} and [an old hat|a broom]. Every day they said good morning to him. When spring
        came, the snowman became smaller and smaller. [{hero} was sad.|"Do not go," said {hero}.] But {hero2} said,
        "[He is only going to the river, and next winter he will come back as snow|Water becomes snow again, we must
        only wait]." """,
    ),
    Plot(
        "the river crossing",
        ("adult", "thing"),
        """{hero} had to bring {a thing} to {hero3} the {job3}, who lived in {town3}. [It was a long way.|{He} left
        early in the morning.] When {he} came to the river, the bridge was gone. [The storm had broken it.|The water
        had carried it away in the night.] {hero} [looked at the deep water|stood on the bank] and thought. "[I
        cannot swim so far|I must not give up]," {he} said. Then {he} saw [an old log|some boards] in the grass and
        had an idea. {He} tied [everything|the wood] together with a rope and made a [small|little] raft. {pet}
        jumped on [first|behind {him}]. [Slowly|With a long stick], {hero} pushed the raft across, and the {thing}
        stayed dry. {hero3} was very surprised. "[How did you get over the river|The bridge is broken, how did you
        come here]?" {he3} asked. "[With a log, a rope and a little courage|I built a raft]," said {hero}. {hero3}
        [cooked {food} for {him}|gave {him} some {food}] and called {him} captain for the rest of the day.""",
    ),
    Plot(
        "the night of stars",
        ("planet", "thing"),
        """One [clear|warm] evening {hero} and {hero2} climbed {hill} with a blanket and {a thing}. They lay down in
        the grass and looked up. [The sky was full of stars.|One star after another came out.] "[That bright one is
        {planet}|Look, there is {planet}]," said {hero2}. "It does not twinkle like the stars, because it is a
        planet." "Is it far away?" asked {hero}. "[Very far|Farther than any road]," said {hero2}. {hero} was quiet
        for a while. "[I feel very small|We are so small]," {he} said [then|at last]. "[Small, but not alone|Small,
        but warm]," said {hero2}. Just then a falling star crossed the sky. [Both made a wish and told no one.|"Make
        a wish!" they both called.] {pet} was already asleep. On the way home they [counted the stars and lost count
        at one hundred|sang softly], and {hero} still dreams of {planet}.""",
    ),
    Plot(
        "market day",
        ("thing", "neighbor", "color"),
        """On {market} there is a market in {town}. {hero} had saved [five|six|eight] coins, and {he} wanted to buy
        {a shade} {thing} for {hero2}. But the {thing} cost more than {he} had. [{hero} walked away slowly.|{He}
        counted the coins again, but there were not enough.] Then {he} saw {hero3} the {job3}, who was trying to
        [lift a heavy box|carry six baskets at once]. "[May I help you|Let me help]?" [asked|said] {hero}. {He}
        [carried|worked] until noon, and [{his} arms hurt|{he} was very hot]. "[You are a strong helper|You have
        worked well]," said {hero3} and gave {him} three coins. Now it was enough! {hero} [ran back|hurried] and
        bought the {shade} {thing}. When {hero2} saw it, {he2} [could not speak for joy|jumped into the air]. "[How
        did you know?|I have wanted one for so long!]" {he2} said. {hero} [only smiled|thought that this was better
        than any {food}].""",
    ),
    Plot(
        "the wish",
        ("wish", "fish color"),
        """{hero} [sat by the river {river} and held a line in the water|was fishing in the river {river}]. Suddenly
        there was a pull, and {he} caught a {fish} fish. "[Let me go|Please put me back]," said the fish, "and you
        may make one wish." {hero} [almost fell into the water|could not believe {his} ears]. {He} thought of {wish}.
        {He} thought of {food}, every day, as much as {he} could eat. Then {he} looked at the fish, which [was
        gasping|looked so sad]. "[I have a warm bed, a good friend and a {kind}|I have {hero2} and {pet}]," said
        {hero}. "[I need nothing else|That is enough]. My wish is that you swim home [safely|to your family]." {He}
        put the fish back into the water. It [jumped once|turned around] and [was gone|swam away]. From that day on,
        whenever {hero} came to the river, [the water sparkled|a {fish} fish jumped], and {he} always [had good
        luck|came home with a full basket].""",
    ),
)
